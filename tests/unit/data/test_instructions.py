"""Instructions from both published forms, and what is said when one is wrong."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.contents import DataFile
from orchestrator.data.instructions import Instruction, Message, check_instructions, read_instructions
from orchestrator.errors import DataError

ALPACA = [
    {"instruction": "Translate.", "input": "你好", "output": "Hello"},
    {"instruction": "Count to three.", "input": "", "output": "1 2 3"},
]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hi!"},
]


def read(file: DataFile) -> list[Instruction]:
    return list(read_instructions("instructions", [file]))


def turns(*pairs: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def test_every_format_gives_the_same_instructions(write, tmp_path: Path):
    pq.write_table(pa.Table.from_pylist(ALPACA), tmp_path / "made")
    expected = [
        Instruction((Message("user", "Translate.\n你好"), Message("assistant", "Hello")), ""),
        Instruction((Message("user", "Count to three."), Message("assistant", "1 2 3")), ""),
    ]
    files = [
        write("a.json", json.dumps(ALPACA)),
        write("a.jsonl", "\n".join(json.dumps(record) for record in ALPACA)),
        write("a.parquet", (tmp_path / "made").read_bytes()),
        write("b.json", json.dumps([ALPACA[0] | {"messages": None}, {"instruction": "Count to three.", "output": "1 2 3"}])),
    ]
    for file in files:
        assert read(file) == expected, file.name
    assert str(read(files[1])[1].where) == "instructions: a.jsonl:2"
    assert check_instructions("instructions", files).instructions == 8


def test_chat_records_keep_their_turns(write, tmp_path: Path):
    pq.write_table(pa.Table.from_pylist([{"messages": TURNS}]), tmp_path / "made")
    expected = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hi!"))
    for file in (write("a.json", json.dumps([{"messages": TURNS}])), write("a.parquet", (tmp_path / "made").read_bytes())):
        assert [instruction.messages for instruction in read(file)] == [expected], file.name
    assert check_instructions("instructions", [file]).characters == len("Be brief.HiHi!")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "Do.", "input": ""}, 'has no "output"; it has instruction, input'),
        ({"instruction": "Do.", "output": None}, 'has no "output"; it has instruction, output'),
        ({"instruction": "Do.", "output": " \n"}, 'its "output" is blank; fill it in, or remove the record'),
        ({"instruction": "", "output": "x"}, 'its "instruction" is blank; fill it in, or remove the record'),
        ({"instruction": "Do.", "input": 3, "output": "x"}, '"input" is a number; it must be text'),
        ({"question": "q", "answer": "a"}, 'has neither "instruction" nor "messages"; it has question, answer'),
        ("text", 'is no object; give one with "instruction" and "output", or with "messages"'),
        ({"messages": "hi"}, '"messages" is no list; give [{"role": ..., "content": ...}, ...]'),
        ({"messages": []}, "has no answer; at least one message must have the role assistant"),
        (turns(("user", "Hi")), "has no answer; at least one message must have the role assistant"),
        (turns(("assistant", "Hi"), ("user", "Hi")), "begins with an answer; a message of the user must come before it"),
        (turns(("user", "Hi"), ("human", "Hi")), "message 2: role human is none of system, user, assistant"),
        (turns(("user", "Hi"), ("assistant", "")), "message 2: the answer is blank; fill it in, or remove the record"),
        ({"messages": [{"from": "user", "value": "x"}]}, 'message 1: needs "role" and "content"; it has from, value'),
        ({"messages": ["Hi"]}, 'message 1: needs "role" and "content"; it has no keys at all'),
    ],
)
def test_a_bad_record_is_named_with_its_place(write, record, message):
    with pytest.raises(DataError) as caught:
        read(write("a.json", json.dumps([ALPACA[0], record])))
    assert str(caught.value) == f"instructions: a.json: record 2: {message}"


def test_files_without_instructions_are_named(write):
    with pytest.raises(
        DataError, match=r"instructions: a.txt is plain text; instructions come as .json, .jsonl or .parquet"
    ):
        read(write("a.txt", "x"))
    with pytest.raises(DataError, match=r"instructions: a.json holds no instruction; add some, or leave it out"):
        read(write("a.json", "[]"))


def test_the_published_instructions_are_read(shared):
    files = [DataFile(str(shared / "instructions" / f"alpaca_{language}_demo.json"), "") for language in ("zh", "en")]
    assert check_instructions("instructions", files).instructions == 1999
