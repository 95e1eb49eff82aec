"""Tokenizes data once. The result is a folder named by all that it depends on, and whole or absent."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.contents import DataFile, data_hash, tokenizer_hash
from orchestrator.data.documents import read_documents
from orchestrator.data.instructions import read_instructions
from orchestrator.data.objectives import RowBatch, answer_rows, held_out_rows, next_token_rows, packed_rows
from orchestrator.data.storage import RowWriter
from orchestrator.data.summary import Objective, Summary, read_summary, write_summary
from orchestrator.data.templates import Template
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.errors import DataError, RecipeError
from orchestrator.store import sha256_value, sync_files, sync_folder

CODE_VERSION = 2
"""To be raised with every change that gives other tokens, so that what was prepared before is not taken for the same."""

MIN_BLOCK_LENGTH = 8
"""Below this, the parts that a row keeps of a prompt and an answer would be no tokens at all."""


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


def prepared_key(preparation: Preparation) -> str:
    """12 hex over all that the rows depend on; where the files lie is no part of it."""
    return sha256_value(_identity(preparation))[:12]


def find_prepared(preparation: Preparation, run_root: Path) -> tuple[Path, int] | None:
    """The complete folder and its number of rows, None when it has yet to be made."""
    folder = _folder(preparation, run_root)
    summary = read_summary(folder)
    return (folder, summary.rows) if summary else None


def prepare(preparation: Preparation, run_root: Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """The folder `<run_root>/data-<key>`, made now or found complete; several processes may ask at once.

    `progress` gets the documents and tokens so far. Raises DataError, ModelError, or RecipeError for a tiny block.
    """
    if preparation.block_length < MIN_BLOCK_LENGTH:
        raise RecipeError(f"block_length {preparation.block_length} is too short; give at least {MIN_BLOCK_LENGTH} tokens")
    folder = _folder(preparation, run_root)
    if read_summary(folder):
        return folder
    run_root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=run_root) as workshop:
        building = Path(workshop) / folder.name
        building.mkdir()
        summary = _write_rows(preparation, building, progress)
        write_summary(building, summary, _identity(preparation))
        sync_files(building)
        _publish(building, folder)
    return folder


def _folder(preparation: Preparation, run_root: Path) -> Path:
    return run_root / f"data-{prepared_key(preparation)}"


def _identity(preparation: Preparation) -> dict[str, Any]:
    return {
        "code": CODE_VERSION,
        "objective": preparation.objective,
        "tokenizer": tokenizer_hash(preparation.tokenizer),
        "data": data_hash(preparation.files),
        "block_length": preparation.block_length,
        "template": preparation.template if preparation.objective == "answers" else None,
        "packing": preparation.packing if preparation.objective == "answers" else None,
    }


def _write_rows(preparation: Preparation, folder: Path, progress: Callable[[int, int], None] | None) -> Summary:
    documents = characters = truncated = 0
    with RowWriter(folder) as writer:
        for batch in _row_batches(preparation):
            writer.append(batch.rows)
            documents += batch.documents
            characters += batch.characters
            truncated += batch.truncated
            if progress:
                progress(documents, writer.tokens)
    if not writer.rows:
        raise DataError(f"{preparation.field}: nothing to learn in {len(preparation.files)} files; they hold no tokens")
    return Summary(
        objective=preparation.objective,
        block_length=preparation.block_length,
        documents=documents,
        characters=characters,
        rows=writer.rows,
        tokens=writer.tokens,
        targets=writer.targets,
        truncated=truncated,
    )


def _row_batches(preparation: Preparation) -> Iterator[RowBatch]:
    tokenizer = load_tokenizer(preparation.tokenizer)
    field, files, block_length = preparation.field, preparation.files, preparation.block_length
    if preparation.objective == "answers":
        rows = answer_rows(tokenizer, read_instructions(field, files), block_length, preparation.template)
        return packed_rows(rows, block_length) if preparation.packing else rows
    if preparation.objective == "held_out":
        return held_out_rows(tokenizer, read_documents(field, files), block_length)
    return next_token_rows(tokenizer, read_documents(field, files), block_length)


def _publish(building: Path, folder: Path) -> None:
    """Renames a finished folder to its name, unless another process was first: then both hold the same bytes."""
    while not read_summary(folder):
        if folder.exists():
            # Half a folder: nothing here leaves one, but an interrupted copy does.
            with suppress(FileNotFoundError):
                folder.rename(Path(tempfile.mkdtemp(dir=building.parent)) / "half")
        try:
            building.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    sync_folder(folder.parent)
