"""From text and instructions to rows: what each objective learns from, batch by batch, in the order of the files."""

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from orchestrator.data.instructions import Instruction
from orchestrator.data.packing import WINDOW, packed
from orchestrator.data.samples import fit
from orchestrator.data.storage import Row
from orchestrator.data.templates import Template, tokenize_instructions
from orchestrator.data.tokenizer import begin_ids, text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_CHARACTERS = 1 << 18
"""How much text is tokenized at once: enough to keep every core busy, little enough to forget."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class RowBatch:
    """The rows that a batch of documents or instructions completes."""

    rows: list[Row]
    documents: int
    characters: int
    truncated: int = 0
    text_bytes: int = 0
    """In UTF-8, where a loss is measured by them."""


def next_token_rows(tokenizer: "PreTrainedTokenizerBase", documents: Iterable[str], block_length: int) -> Iterator[RowBatch]:
    """All documents as one stream, each between begin and end tokens, cut into rows; all tokens are kept and learned."""
    begin, end = begin_ids(tokenizer), [tokenizer.eos_token_id]
    stream = np.zeros(0, np.int32)
    for batch in _batches(documents, len):
        tokens = array("i")
        for ids in text_ids(tokenizer, batch):
            tokens.extend(begin)
            tokens.extend(ids)
            tokens.extend(end)
        stream = np.concatenate([stream, np.frombuffer(tokens, np.int32)])
        # One token is held back: as a row of its own at the end it would have nothing to learn.
        full = max(0, len(stream) - 2) // block_length * block_length
        rows = [_all_loss(row) for row in stream[:full].reshape(-1, block_length)]
        stream = stream[full:]
        yield RowBatch(rows, len(batch), sum(map(len, batch)))
    cut = len(stream) - 2 if len(stream) > block_length else 0
    yield RowBatch([_all_loss(row) for row in (stream[:cut], stream[cut:]) if len(row) > 1], 0, 0)


def held_out_rows(tokenizer: "PreTrainedTokenizerBase", documents: Iterable[str], block_length: int) -> Iterator[RowBatch]:
    """Each document alone, in windows that begin with a token that is given and not predicted; no end tokens.

    The loss over all windows, in bits, divided by the characters is the text's bits per character.
    """
    begin = begin_ids(tokenizer) or [tokenizer.eos_token_id]
    width = block_length - 1
    for batch in _batches(documents, len):
        windows = [ids[at : at + width] for ids in text_ids(tokenizer, batch) for at in range(0, len(ids), width)]
        rows = [Row(np.array(begin + ids, np.int32), np.arange(1 + len(ids)) > 0) for ids in windows]
        yield RowBatch(rows, len(batch), sum(map(len, batch)), text_bytes=sum(map(_bytes, batch)))


def answer_rows(
    tokenizer: "PreTrainedTokenizerBase",
    instructions: Iterable[Instruction],
    block_length: int,
    template: Template,
    are_measured: bool = False,
) -> Iterator[RowBatch]:
    """A row for each instruction, with loss on its answers and their end tokens.

    Where the loss is measured, of the text only the answers are counted, so that it compares by their characters and bytes.
    """
    begin = begin_ids(tokenizer)
    for batch in _batches(instructions, lambda instruction: instruction.characters):
        samples = tokenize_instructions(tokenizer, template, batch)
        measured = [instruction.answers for instruction in batch] if are_measured else []
        yield RowBatch(
            rows=[fit(sample, block_length, begin) for sample in samples],
            documents=len(batch),
            characters=sum(map(len, measured) if are_measured else (each.characters for each in batch)),
            truncated=sum(len(sample) > block_length for sample in samples),
            text_bytes=sum(map(_bytes, measured)),
        )


def packed_rows(batches: Iterable[RowBatch], block_length: int) -> Iterator[RowBatch]:
    """The same samples, several to a row; so many are held at once that hardly a row is left half empty."""
    held: list[Row] = []
    for batch in batches:
        held += batch.rows
        full = len(held) // WINDOW * WINDOW
        rows = [row for first in range(0, full, WINDOW) for row in packed(held[first : first + WINDOW], block_length)]
        held = held[full:]
        yield replace(batch, rows=rows)
    yield RowBatch(packed(held, block_length), 0, 0)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", errors="surrogatepass"))


def _all_loss(tokens: np.ndarray) -> Row:
    return Row(tokens, np.ones(len(tokens), np.bool_))


def _batches(items: Iterable[Item], characters: Callable[[Item], int]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    held = 0
    for item in items:
        batch.append(item)
        held += characters(item)
        if held >= BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
