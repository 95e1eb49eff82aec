"""Data files cut into parts that are prepared apart from each other; where they are cut depends on the files alone."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import fsspec

from orchestrator.contents import DataFile
from orchestrator.errors import DataError

PART_BYTES = 1 << 23
"""Enough that the row which a part may leave unfilled at its end does not count, and little enough to lose in a crash."""

CHECKED_BYTES = 1 << 28
"""Of each file, read before anything is started: seconds, however large it is."""

_CUT_SUFFIXES = (".jsonl", ".txt", ".parquet")
"""A .json file is one value, which can only be read as a whole."""


@dataclass(frozen=True)
class FileSlice:
    """The records of a file that begin in some of its bytes."""

    file: DataFile
    start: int = 0
    stop: int | None = None
    """The first byte after it; None for the end of the file."""
    size: int | None = None
    """Of the whole file, in bytes; None where it is not cut."""
    share: float = 1.0
    """Of its documents, how many count; which ones follows from what they say."""
    place: int = 0
    """Of the file among all, which may hold one twice."""

    @property
    def name(self) -> str:
        """The same in each pass over the data."""
        return f"{self.place}-{self.start}"

    @property
    def bytes(self) -> int:
        assert self.size is not None
        return (self.size if self.stop is None else self.stop) - self.start

    def holds(self, place: int, places: int) -> bool:
        """Whether one of a file's `places` equal pieces, such as Parquet's row groups, counts to this slice."""
        at = place * (self.size or 0) // places
        return self.start <= at and (self.stop is None or at < self.stop)


@dataclass(frozen=True)
class Part:
    """Slices that are read one after another."""

    number: int
    slices: tuple[FileSlice, ...]

    @property
    def bytes(self) -> int:
        return sum(slice_.bytes for slice_ in self.slices)

    @property
    def name(self) -> str:
        return f"{self.number:06d}"


def parts_of(field: str, files: Sequence[DataFile], part_bytes: int) -> list[Part]:
    """The files in order, as often as their weights say: 2.5 is two times all of a file, and then half of it.

    DataError names `field` and a file that is not there any more.
    """
    sizes = {file.url: _size(field, file) for file in files}
    rounds = max((math.ceil(file.weight) for file in files), default=0)
    parts: list[Part] = []
    for passed in range(rounds):
        slices = (
            replace(piece, share=min(1.0, file.weight - passed), place=place)
            for place, file in enumerate(files)
            if file.weight > passed
            for piece in _pieces(file, sizes[file.url], part_bytes)
        )
        # A part of its own for each pass, so that a document and its repetition do not share a row.
        parts += [Part(number, group) for number, group in enumerate(_groups(slices, part_bytes), start=len(parts))]
    return parts


def beginnings(field: str, files: Sequence[DataFile], most_bytes: int) -> list[FileSlice]:
    """Of each file the first bytes, or all where it is no larger or cannot be cut. Raises DataError as `parts_of` does."""
    return [next(_pieces(file, _size(field, file), most_bytes)) for file in files]


def _pieces(file: DataFile, size: int, part_bytes: int) -> Iterator[FileSlice]:
    starts = range(0, size, part_bytes) if file.name.endswith(_CUT_SUFFIXES) else range(1)
    for start in starts:
        is_last = start + part_bytes >= size or len(starts) == 1
        yield FileSlice(file, start, None if is_last else start + part_bytes, size)


def _groups(slices: Iterator[FileSlice], part_bytes: int) -> Iterator[tuple[FileSlice, ...]]:
    group: list[FileSlice] = []
    for piece in slices:
        if group and sum(each.bytes for each in group) + piece.bytes > part_bytes:
            yield tuple(group)
            group = []
        group.append(piece)
    if group:
        yield tuple(group)


def _size(field: str, file: DataFile) -> int:
    try:
        filesystem, path = cast("tuple[Any, str]", fsspec.core.url_to_fs(file.location))
        return int(filesystem.size(path))
    except FileNotFoundError as error:
        raise DataError(f"{field}: {file.name}: no such file any more; it was at {file.location}") from error
