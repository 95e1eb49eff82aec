"""One part of the data, prepared into a folder of its own, by whichever process."""

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from orchestrator.contents import DataFile, data_hash, tokenizer_hash
from orchestrator.data import documents, instructions
from orchestrator.data.choice import EVERYTHING, Choice, Item, digest
from orchestrator.data.instructions import Instruction
from orchestrator.data.objectives import RowBatch, answer_rows, held_out_rows, next_token_rows, packed_rows
from orchestrator.data.records import Complain, stop
from orchestrator.data.slices import PART_BYTES, FileSlice, Part, parts_of
from orchestrator.data.storage import RowWriter
from orchestrator.data.summary import Objective
from orchestrator.data.templates import Template
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.errors import DataError
from orchestrator.store import read_json, sync_files, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CODE_VERSION = 4
"""To be raised with every change that gives other tokens or counts: what was prepared before must not pass for the same."""

_COUNTS_NAME = "counts.json"
_BAD_SHOWN = 3


@dataclass(frozen=True)
class Preparation:
    """What is to be prepared, and from what."""

    objective: Objective
    tokenizer: Path
    """A local folder."""
    field: str
    """The recipe's field that names the files; only for errors."""
    files: tuple[DataFile, ...]
    block_length: int
    """Tokens in a row, at most."""
    template: Template = "alpaca"
    """Matters for answers only."""
    packing: bool = False
    """Several samples to a row; matters for answers only."""
    choice: Choice = EVERYTHING
    part_bytes: int = PART_BYTES
    """No row reaches over the end of a part."""

    @property
    def is_of_instructions(self) -> bool:
        return self.objective in ("answers", "held_out_answers")

    def identity(self) -> dict[str, Any]:
        """All that the rows depend on; where the files lie is no part of it."""
        is_answers = self.is_of_instructions
        return {
            "code": CODE_VERSION,
            "objective": self.objective,
            "tokenizer": tokenizer_hash(self.tokenizer),
            "data": data_hash(self.files),
            "block_length": self.block_length,
            "template": self.template if is_answers else None,
            "packing": self.packing if is_answers else None,
            "choice": self.choice.identity(has_shares=any(file.weight % 1 for file in self.files)),
            "part_bytes": self.part_bytes,
        }

    def parts(self) -> list[Part]:
        return parts_of(self.field, self.files, self.part_bytes)

    def nothing_in(self, file: DataFile) -> DataError:
        """What is wrong with a file that holds no document."""
        missing = instructions.no_instruction if self.is_of_instructions else documents.no_document
        return missing(self.field, file)

    def read(self, piece: FileSlice, complain: Complain) -> Iterator[Item]:
        """The documents or instructions of a part of a file."""
        reader = instructions.read_slice if self.is_of_instructions else documents.read_slice
        return cast("Iterator[Item]", reader(self.field, piece, complain))


@dataclass
class PartCounts:
    """What a part amounts to."""

    documents: int = 0
    characters: int = 0
    text_bytes: int = 0
    truncated: int = 0
    tokens: int = 0
    targets: int = 0
    duplicates: int = 0
    bad: int = 0
    complaints: list[str] = field(default_factory=list)
    """About the first of the bad records."""
    read: dict[str, int] = field(default_factory=dict)
    """Documents found in each file, wanted or not, by its place among the files: JSON has no other keys than text, and where
    a file lies may change before the next process goes on."""


class PartMaker:
    """Tokenizes parts, one after another; holds the tokenizer."""

    def __init__(self, preparation: Preparation, workshop: Path) -> None:
        self._preparation, self._workshop = preparation, workshop
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def make(self, part: Part) -> PartCounts:
        """Leaves the part's rows in its folder, which is whole or absent. Raises DataError and ModelError."""
        counts = PartCounts()
        building = self._workshop / f".{part.name}-{os.getpid()}"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        with RowWriter(building) as writer:
            for batch in self._row_batches(self._wanted(part, counts)):
                writer.append(batch.rows)
                counts.documents += batch.documents
                counts.characters += batch.characters
                counts.text_bytes += batch.text_bytes
                counts.truncated += batch.truncated
            counts.tokens, counts.targets = writer.tokens, writer.targets
        write_json(building / _COUNTS_NAME, asdict(counts))
        sync_files(building)
        try:
            building.rename(self._workshop / part.name)
        except OSError:
            # Made twice, as when Ray takes a slow process for a lost one; both hold the same bytes.
            if not read_counts(self._workshop, part):
                raise
            shutil.rmtree(building)
        return counts

    def mark(self, part: Part) -> None:
        """Leaves the digests of all that its slices hold, a file each: uint8 [documents, 16]."""
        for piece in part.slices:
            found = b"".join(map(digest, self._preparation.read(piece, self._complain(PartCounts()))))
            path = marks_file(self._workshop, piece)
            building = path.with_name(f".{path.name}-{os.getpid()}.npy")
            np.save(building, np.frombuffer(found, np.uint8).reshape(-1, 16))
            building.rename(path)

    def _wanted(self, part: Part, counts: PartCounts) -> Iterator[Item]:
        preparation, choice = self._preparation, self._preparation.choice
        complain = self._complain(counts)
        for piece in part.slices:
            firsts = self._firsts(piece)
            must_mark = choice.split is not None or piece.share < 1
            file = str(piece.place)
            counts.read.setdefault(file, 0)
            for place, item in enumerate(preparation.read(piece, complain)):
                counts.read[file] += 1
                if firsts is not None and not firsts[place]:
                    counts.duplicates += 1
                    continue
                mark = digest(item) if must_mark else b""
                if choice.is_on_side(mark) and choice.is_in_share(mark, piece.share):
                    yield item

    def _firsts(self, piece: FileSlice) -> np.ndarray | None:
        """bool [documents]: those that no earlier one equals; None where copies count, too."""
        if not self._preparation.choice.deduplicate:
            return None
        return np.load(firsts_file(self._workshop, piece))

    def _complain(self, counts: PartCounts) -> Complain:
        if self._preparation.choice.bad == "stop":
            return stop

        def count(error: DataError) -> None:
            counts.bad += 1
            if counts.bad <= _BAD_SHOWN:
                counts.complaints.append(str(error))

        return count

    def _row_batches(self, items: Iterable[Item]) -> Iterator[RowBatch]:
        self._tokenizer = self._tokenizer or load_tokenizer(self._preparation.tokenizer)
        preparation, block_length = self._preparation, self._preparation.block_length
        if preparation.is_of_instructions:
            given = cast("Iterable[Instruction]", items)
            are_measured = preparation.objective == "held_out_answers"
            rows = answer_rows(self._tokenizer, given, block_length, preparation.template, are_measured)
            return packed_rows(rows, block_length) if preparation.packing else rows
        make = held_out_rows if preparation.objective == "held_out" else next_token_rows
        return make(self._tokenizer, cast("Iterable[str]", items), block_length)


def read_counts(workshop: Path, part: Part) -> PartCounts | None:
    """Of a part that is done; None of one that has yet to be made."""
    path = workshop / part.name / _COUNTS_NAME
    return PartCounts(**read_json(path)) if path.is_file() else None


def marks_file(workshop: Path, piece: FileSlice) -> Path:
    """Where the digests of a slice are left."""
    return workshop / f"marks-{piece.name}.npy"


def firsts_file(workshop: Path, piece: FileSlice) -> Path:
    """Where it is left which of a slice's documents are no copies."""
    return workshop / f"firsts-{piece.name}.npy"
