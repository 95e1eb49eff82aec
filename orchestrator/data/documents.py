"""Text documents as they are published: JSON lines, JSON, plain lines or Parquet, local or behind a URL."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orchestrator.contents import DataFile
from orchestrator.data.records import Record, keys_of, read_records, text_value
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
        for record in read_records(field, file, ("text",)):
            text = _text_of(record)
            if text and not text.isspace():
                blank = False
                yield text
        if blank:
            raise DataError(f"{field}: {file.name} holds no document; add text to it, or leave it out")


def check_documents(field: str, files: Sequence[DataFile]) -> DocumentCounts:
    """Reads every document without tokenizing it, so that a bad line is found before any worker starts."""
    documents = characters = 0
    for text in read_documents(field, files):
        documents += 1
        characters += len(text)
    return DocumentCounts(documents, characters)


def _text_of(record: Record) -> str:
    if not isinstance(record.value, dict):
        return text_value(record.where, "text", record.value)
    if "text" not in record.value:
        raise DataError(f'{record.where}: has no "text"; it has {keys_of(record.value)}')
    return text_value(record.where, "text", record.value["text"])
