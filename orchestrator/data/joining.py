"""Parts joined in their order, as they are made: rows that grow in one folder, and a note of how far they have come."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from orchestrator.data.part import PartCounts, Preparation, read_counts
from orchestrator.data.slices import Part
from orchestrator.data.storage import RowWriter
from orchestrator.data.summary import Summary
from orchestrator.store import read_json, write_json

_NOTE_NAME = "joined.json"


@dataclass(frozen=True)
class Progress:
    """How far a preparation has come."""

    bytes: int
    """Of the data, that are prepared."""
    total_bytes: int
    documents: int
    tokens: int


@dataclass
class _Note:
    """What was joined when it was written; arrays that are longer are cut back to it."""

    parts: int = 0
    bytes: int = 0
    total_bytes: int = 0
    lengths: dict[str, int] = field(default_factory=dict)
    counts: PartCounts = field(default_factory=PartCounts)


def read_progress(workshop: Path) -> Progress | None:
    """From the note that is there."""
    note = _read_note(workshop)
    return Progress(note.bytes, note.total_bytes, note.counts.documents, note.counts.tokens) if note else None


class Joining:
    """Takes the folders of parts away as it joins them; goes on from what an earlier process has joined."""

    def __init__(self, workshop: Path, parts: Sequence[Part]) -> None:
        self.folder = workshop / "rows"
        self._workshop, self._parts = workshop, parts
        self._note = _read_note(workshop) or _Note(total_bytes=sum(part.bytes for part in parts))
        self.folder.mkdir(exist_ok=True)
        self._writer = RowWriter(self.folder, self._note.lengths)

    @property
    def joined(self) -> int:
        """How many parts, from the first."""
        return self._note.parts

    @property
    def read(self) -> dict[str, int]:
        """Documents found in each file."""
        return self._note.counts.read

    def join_what_is_there(self) -> None:
        """As far as no part is missing."""
        while self.joined < len(self._parts):
            part = self._parts[self.joined]
            counts = read_counts(self._workshop, part)
            if counts is None:
                return
            self._writer.append_folder(self._workshop / part.name)
            self._writer.sync()
            note = self._note
            self._note = _Note(
                note.parts + 1,
                note.bytes + part.bytes,
                note.total_bytes,
                self._writer.lengths,
                _sum(note.counts, counts),
            )
            write_json(self._workshop / _NOTE_NAME, asdict(self._note))
            shutil.rmtree(self._workshop / part.name)

    def summary(self, preparation: Preparation) -> Summary:
        """Of all parts."""
        assert self.joined == len(self._parts), "a part is missing"
        counts = self._note.counts
        return Summary(
            objective=preparation.objective,
            block_length=preparation.block_length,
            documents=counts.documents,
            characters=counts.characters,
            text_bytes=counts.text_bytes,
            rows=self._writer.rows,
            tokens=self._writer.tokens,
            targets=counts.targets,
            truncated=counts.truncated,
            duplicates=counts.duplicates,
            bad=counts.bad,
            complaints=tuple(counts.complaints),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.close()


def _read_note(workshop: Path) -> _Note | None:
    if not (workshop / _NOTE_NAME).is_file():
        return None
    written = read_json(workshop / _NOTE_NAME)
    counts = PartCounts(**written.pop("counts"))
    return _Note(**written, counts=counts)


def _sum(left: PartCounts, right: PartCounts) -> PartCounts:
    """Of numbers the sum; of complaints the first; of files the sum for each."""
    read = {file: left.read.get(file, 0) + right.read.get(file, 0) for file in {**left.read, **right.read}}
    names = ("documents", "characters", "text_bytes", "truncated", "tokens", "targets", "duplicates", "bad")
    numbers = {name: getattr(left, name) + getattr(right, name) for name in names}
    return PartCounts(**numbers, complaints=[*left.complaints, *right.complaints][:3], read=read)
