"""Text documents as they are published: JSON lines, JSON, plain lines or Parquet, local or behind a URL."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orchestrator.contents import DataFile
from orchestrator.data.records import Complain, Record, keys_of, read_records, stop, text_value
from orchestrator.data.slices import CHECKED_BYTES, FileSlice, beginnings
from orchestrator.errors import DataError


@dataclass(frozen=True)
class DocumentCounts:
    """How much text there is."""

    documents: int
    characters: int


def read_documents(field: str, files: Sequence[DataFile]) -> Iterator[str]:
    """The documents of `files` in order, without the blank ones.

    A line of a .txt file is a document; elsewhere a record is one, with its text under "text".
    Raises DataError naming the recipe's `field`, the file and the line.
    """
    for file in files:
        blank = True
        for text in read_slice(field, FileSlice(file)):
            blank = False
            yield text
        if blank:
            raise no_document(field, file)


def read_slice(field: str, piece: FileSlice, complain: Complain = stop) -> Iterator[str]:
    """The documents of a part of a file; `complain` hears of records that are none."""
    for record in read_records(field, piece, ("text",), complain):
        try:
            text = _text_of(record)
        except DataError as error:
            complain(error)
            continue
        if text and not text.isspace():
            yield text


def no_document(field: str, file: DataFile) -> DataError:
    """What is wrong with a file of blank lines."""
    return DataError(f"{field}: {file.name} holds no document; add text to it, or leave it out")


def check_documents(field: str, files: Sequence[DataFile], complain: Complain = stop) -> DocumentCounts:
    """Reads documents without tokenizing them, so that a bad line is found before any worker starts.

    Of a file larger than CHECKED_BYTES only the begin; the rest is read when it is prepared.
    """
    documents = characters = 0
    for piece in beginnings(field, files, CHECKED_BYTES):
        before = documents
        for text in read_slice(field, piece, complain):
            documents += 1
            characters += len(text)
        if documents == before:
            raise no_document(field, piece.file)
    return DocumentCounts(documents, characters)


def _text_of(record: Record) -> str:
    if not isinstance(record.value, dict):
        return text_value(record.where, "text", record.value)
    if "text" not in record.value:
        raise DataError(f'{record.where}: has no "text"; it has {keys_of(record.value)}')
    return text_value(record.where, "text", record.value["text"])
