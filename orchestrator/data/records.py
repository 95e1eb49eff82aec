"""The records of a data file, one after another, each with the place that an error about it names."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, cast

import fsspec

from orchestrator.contents import DataFile
from orchestrator.errors import DataError

_PARQUET_ROWS = 1024
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One line, list entry or row of a data file."""

    where: str
    """The recipe's field, the file and the line: how an error about this record begins."""
    value: object


def read_records(field: str, file: DataFile, columns: Sequence[str]) -> Iterator[Record]:
    """The records of a .jsonl, .json, .txt or .parquet file; of a Parquet file only `columns` are read.

    A .json file is held in memory as a whole, the others are streamed. Raises DataError naming `field`, file and place.
    """
    place = f"{field}: {file.name}"
    try:
        with cast("IO[bytes]", fsspec.open(file.location, "rb")) as opened:
            if file.name.endswith(".jsonl"):
                yield from _json_lines(place, opened)
            elif file.name.endswith(".json"):
                yield from _json_list(place, opened.read())
            elif file.name.endswith(".parquet"):
                yield from _parquet_rows(place, opened, columns)
            else:
                yield from _lines(place, opened)
    except FileNotFoundError as error:
        raise DataError(f"{place}: no such file any more; it was at {file.location}") from error


def keys_of(value: dict) -> str:
    """The keys of a record, for an error that says what was found instead."""
    return ", ".join(str(key) for key in value) or "no keys at all"


def text_value(where: str, name: str, value: object) -> str:
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


def _lines(place: str, opened: IO[bytes]) -> Iterator[Record]:
    """Only line feeds end a line: a text may hold the other characters that Python's splitlines() would cut at."""
    for number, line in enumerate(opened, start=1):
        where = f"{place}:{number}"
        yield Record(where, _decode(where, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line).rstrip("\r\n"))


def _json_lines(place: str, opened: IO[bytes]) -> Iterator[Record]:
    for line in _lines(place, opened):
        if not str(line.value).strip():
            continue
        try:
            yield Record(line.where, json.loads(str(line.value)))
        except json.JSONDecodeError as error:
            problem = f"{error.msg}: column {error.colno}"
            raise DataError(f"{line.where}: not JSON ({problem}); fix or remove the line") from error


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
        yield Record(f"{place}: record {number}", record)


def _parquet_rows(place: str, opened: IO[bytes], columns: Sequence[str]) -> Iterator[Record]:
    import pyarrow  # noqa: PLC0415  reading documents should not wait for it
    import pyarrow.parquet  # noqa: PLC0415

    try:
        table = pyarrow.parquet.ParquetFile(opened)
        present = [name for name in columns if name in table.schema_arrow.names]
        if not present:
            wanted = ", ".join(f'"{name}"' for name in columns)
            raise DataError(f"{place}: has no column {wanted}; it has {', '.join(table.schema_arrow.names)}")
        rows = (row for batch in table.iter_batches(_PARQUET_ROWS, columns=present) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield Record(f"{place}: row {number}", row)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{place}: not Parquet ({error}); fetch or write the file again") from error


def _decode(place: str, content: bytes) -> str:
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
