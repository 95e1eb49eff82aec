"""Instructions with their answers, as Alpaca records or as chat messages."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from orchestrator.contents import DataFile
from orchestrator.data.records import Complain, Record, Where, keys_of, read_records, stop, text_value
from orchestrator.data.slices import CHECKED_BYTES, FileSlice, beginnings
from orchestrator.errors import DataError

Role = Literal["system", "user", "assistant"]
_FIELDS = ("instruction", "input", "output", "messages")


@dataclass(frozen=True)
class Message:
    """What one side says in one turn."""

    role: Role
    content: str


@dataclass(frozen=True)
class Instruction:
    """A conversation with at least one answer to learn; an Alpaca record is one of a single turn."""

    messages: tuple[Message, ...]
    where: object = field(compare=False)
    """Prints as recipe field, file and record, as an error names them."""

    @property
    def characters(self) -> int:
        return sum(len(message.content) for message in self.messages)

    @property
    def answers(self) -> str:
        """All of them, one behind the other."""
        return "".join(message.content for message in self.messages if message.role == "assistant")


@dataclass(frozen=True)
class InstructionCounts:
    """How much there is to learn from."""

    instructions: int
    characters: int


def read_instructions(field: str, files: Sequence[DataFile]) -> Iterator[Instruction]:
    """The instructions of `files` in order; every answer in them holds more than blanks.

    Raises DataError naming the recipe's `field`, the file and the record.
    """
    for file in files:
        empty = True
        for instruction in read_slice(field, FileSlice(file)):
            empty = False
            yield instruction
        if empty:
            raise no_instruction(field, file)


def read_slice(field: str, piece: FileSlice, complain: Complain = stop) -> Iterator[Instruction]:
    """The instructions of a part of a file; `complain` hears of records that are none."""
    if piece.file.name.endswith(".txt"):
        raise DataError(f"{field}: {piece.file.name} is plain text; instructions come as .json, .jsonl or .parquet")
    for record in read_records(field, piece, _FIELDS, complain):
        try:
            instruction = _instruction(record)
        except DataError as error:
            complain(error)
        else:
            yield instruction


def no_instruction(field: str, file: DataFile) -> DataError:
    """What is wrong with a file that holds nothing."""
    return DataError(f"{field}: {file.name} holds no instruction; add some, or leave it out")


def check_instructions(field: str, files: Sequence[DataFile], complain: Complain = stop) -> InstructionCounts:
    """Reads instructions without tokenizing them, so that a bad one is found before any worker starts.

    Of a file larger than CHECKED_BYTES only the begin; the rest is read when it is prepared.
    """
    instructions = characters = 0
    for piece in beginnings(field, files, CHECKED_BYTES):
        before = instructions
        for instruction in read_slice(field, piece, complain):
            instructions += 1
            characters += instruction.characters
        if instructions == before:
            raise no_instruction(field, piece.file)
    return InstructionCounts(instructions, characters)


def _instruction(record: Record) -> Instruction:
    where, value = record.where, record.value
    if not isinstance(value, dict):
        raise DataError(f'{where}: is no object; give one with "instruction" and "output", or with "messages"')
    if value.get("messages") is not None:
        return Instruction(_messages(where, value["messages"]), where)
    if value.get("instruction") is not None:
        return Instruction(_alpaca_messages(where, value), where)
    raise DataError(f'{where}: has neither "instruction" nor "messages"; it has {keys_of(value)}')


def _alpaca_messages(where: Where, value: dict) -> tuple[Message, ...]:
    """The published way to join: a non-empty input follows the instruction on a line of its own."""
    prompt = text_value(where, "instruction", value["instruction"])
    extra = "" if value.get("input") is None else text_value(where, "input", value["input"])
    if value.get("output") is None:
        raise DataError(f'{where}: has no "output"; it has {keys_of(value)}')
    answer = _not_blank(where, 'its "output"', text_value(where, "output", value["output"]))
    prompt = _not_blank(where, 'its "instruction"', f"{prompt}\n{extra}" if extra else prompt)
    return Message("user", prompt), Message("assistant", answer)


def _messages(where: Where, values: object) -> tuple[Message, ...]:
    if not isinstance(values, list):
        raise DataError(f'{where}: "messages" is no list; give [{{"role": ..., "content": ...}}, ...]')
    messages = tuple(_message(_Turn(where, number), value) for number, value in enumerate(values, start=1))
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise DataError(f"{where}: has no answer; at least one message must have the role assistant")
    if "user" not in roles[: roles.index("assistant")]:
        raise DataError(f"{where}: begins with an answer; a message of the user must come before it")
    return messages


@dataclass(frozen=True)
class _Turn:
    """Where a message stands; written out only for an error."""

    where: Where
    number: int

    def __str__(self) -> str:
        return f"{self.where}: message {self.number}"


def _message(where: _Turn, value: object) -> Message:
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        found = keys_of(value) if isinstance(value, dict) else "no keys at all"
        raise DataError(f'{where}: needs "role" and "content"; it has {found}')
    role = value["role"]
    if role not in get_args(Role):
        raise DataError(f"{where}: role {role} is none of {', '.join(get_args(Role))}")
    content = text_value(where, "content", value["content"])
    return Message(role, _not_blank(where, "the answer", content) if role == "assistant" else content)


def _not_blank(where: object, what: str, text: str) -> str:
    if not text or text.isspace():
        raise DataError(f"{where}: {what} is blank; fill it in, or remove the record")
    return text
