"""The records of a data file, one after another, each with the place that an error about it names."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, cast

import fsspec

from orchestrator.data.slices import FileSlice
from orchestrator.errors import DataError

_PARQUET_ROWS = 1024
_CHUNK_BYTES = 1 << 22
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Complain = Callable[[DataError], None]
"""What is done about a bad record: it raises, or the record is left out."""


def stop(error: DataError) -> None:
    """Lets no bad record pass."""
    raise error


def pass_by(error: DataError) -> None:
    """Leaves bad records to somebody else."""


@dataclass(frozen=True)
class Where:
    """The recipe's field, the file and the line: how an error about a record begins. Written out only for an error."""

    place: str
    number: int
    """From 1, in the part of the file that is read."""
    before: Callable[[], int] = field(compare=False)
    """How many lines, or rows, the file has before that part."""
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.place}:{self.kind}{self.before() + self.number}"


@dataclass(frozen=True)
class Record:
    """One line, list entry or row of a data file."""

    where: Where
    value: object


def read_records(field: str, piece: FileSlice, columns: Sequence[str], complain: Complain = stop) -> Iterator[Record]:
    """The records of a .jsonl, .json, .txt or .parquet file; of a Parquet file only `columns` are read.

    A .json file is held in memory as a whole, the others are streamed. `complain` hears of lines that are no records; what
    is wrong with a whole file is raised as DataError. Both name `field`, file and place.
    """
    file = piece.file
    place = f"{field}: {file.name}"
    try:
        with cast("IO[bytes]", fsspec.open(file.location, "rb")) as opened:
            if file.name.endswith(".jsonl"):
                yield from _json_lines(place, opened, piece, complain)
            elif file.name.endswith(".json"):
                yield from _json_list(place, opened.read())
            elif file.name.endswith(".parquet"):
                yield from _parquet_rows(place, opened, piece, columns)
            else:
                yield from _lines(place, opened, piece, complain)
    except FileNotFoundError as error:
        raise DataError(f"{place}: no such file any more; it was at {file.location}") from error


def keys_of(value: dict) -> str:
    """The keys of a record, for an error that says what was found instead."""
    return ", ".join(str(key) for key in value) or "no keys at all"


def text_value(where: object, name: str, value: object) -> str:
    """`value` as text that can be encoded; DataError otherwise."""
    if not isinstance(value, str):
        raise DataError(f'{where}: "{name}" is {_kind(value)}; it must be text')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can escape half of an emoji. Tokenizers refuse it, without saying where.
        half = ascii(value[error.start]).strip("'")
        raise DataError(
            f'{where}: "{name}" has half a character ({half}) at position {error.start:,}; remove it, or write both halves'
        ) from error
    return value


def _lines(place: str, opened: IO[bytes], piece: FileSlice, complain: Complain) -> Iterator[Record]:
    """Only line feeds end a line: a text may hold the other characters that Python's splitlines() would cut at."""
    at = _go_to_line(opened, piece.start)
    first = at

    def before() -> int:
        return _line_feeds(piece, first)

    for number, line in enumerate(opened, start=1):
        if piece.stop is not None and at >= piece.stop:
            return
        where = Where(place, number, before)
        content = line.removeprefix(_BYTE_ORDER_MARK) if at == 0 else line
        at += len(line)
        try:
            text = _decode(where, content).rstrip("\r\n")
        except DataError as error:
            complain(error)
        else:
            yield Record(where, text)


def _go_to_line(opened: IO[bytes], start: int) -> int:
    """Where the first line begins that does so at `start` or after."""
    if start == 0:
        return 0
    opened.seek(start - 1)
    return start - 1 + len(opened.readline())


def _line_feeds(piece: FileSlice, stop: int) -> int:
    """Before byte `stop` of the file."""
    found = 0
    with cast("IO[bytes]", fsspec.open(piece.file.location, "rb")) as opened:
        while stop > 0:
            chunk = opened.read(min(_CHUNK_BYTES, stop))
            found += chunk.count(b"\n")
            stop -= len(chunk)
    return found


def _json_lines(place: str, opened: IO[bytes], piece: FileSlice, complain: Complain) -> Iterator[Record]:
    for line in _lines(place, opened, piece, complain):
        if not str(line.value).strip():
            continue
        try:
            value = json.loads(str(line.value))
        except json.JSONDecodeError as error:
            problem = f"{error.msg}: column {error.colno}"
            complain(DataError(f"{line.where}: not JSON ({problem}); fix or remove the line"))
        else:
            yield Record(line.where, value)


def _json_list(place: str, content: bytes) -> Iterator[Record]:
    text = _decode(place, content.removeprefix(_BYTE_ORDER_MARK))
    if not text.strip():
        return
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; with one object on each line, name it .jsonl" if error.msg == "Extra data" else "; fix the file"
        raise DataError(f"{place}:{error.lineno}: not JSON ({error.msg}: column {error.colno}){hint}") from error
    if not isinstance(records, list):
        raise DataError(f"{place}: holds {_kind(records)}; a .json file must hold one list of records")
    for number, record in enumerate(records, start=1):
        yield Record(Where(place, number, int, " record "), record)


def _parquet_rows(place: str, opened: IO[bytes], piece: FileSlice, columns: Sequence[str]) -> Iterator[Record]:
    import pyarrow  # noqa: PLC0415  reading documents should not wait for it
    import pyarrow.parquet  # noqa: PLC0415

    try:
        table = pyarrow.parquet.ParquetFile(opened)
        present = [name for name in columns if name in table.schema_arrow.names]
        if not present:
            wanted = ", ".join(f'"{name}"' for name in columns)
            raise DataError(f"{place}: has no column {wanted}; it has {', '.join(table.schema_arrow.names)}")
        groups = [group for group in range(table.num_row_groups) if piece.holds(group, table.num_row_groups)]
        rows_before = sum(table.metadata.row_group(group).num_rows for group in range(min(groups, default=0)))
        batches = table.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=present)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield Record(Where(place, number, lambda: rows_before, " row "), row)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{place}: not Parquet ({error}); fetch or write the file again") from error


def _decode(place: object, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 (byte 0x{content[error.start]:02x}); convert the file, e.g. with iconv -t UTF-8"
        ) from error


def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case _:
            return "an object"
