"""The completion record: written last, it alone means that a stage is done."""

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.store import read_json, sha256_file, sync_files, write_json

RECORD_NAME = "record.json"
RECORD_FORMAT = 1
WORK_NAMES = ("checkpoints", "evaluations.jsonl", "ledger.jsonl", "lease.json", "logs", "metrics.jsonl", "wandb", "work")
"""What a stage's folder holds beside its artifact."""


@dataclass(frozen=True)
class Record:
    """What a finished stage was, what it made, and how it went."""

    stage: str
    kind: str
    fingerprint: str
    identity: dict[str, Any]
    """The payload that the fingerprint hashes, kept so that a change can be explained field by field."""
    parents: dict[str, str]
    """Fingerprints of the stages it was made from, by name."""
    recipe: dict[str, Any]
    """The whole resolved recipe of the command that ran the stage."""
    results: dict[str, Any]
    environment: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of each file of the artifact, by path below the stage's folder."""
    finished: float = 0.0
    """Seconds since the epoch."""
    format: int = RECORD_FORMAT


def read_record(folder: Path) -> Record | None:
    """The record of a finished stage, or None when the stage is not done."""
    path = folder / RECORD_NAME
    if not path.is_file():
        return None
    value = read_json(path)
    if value.get("format") != RECORD_FORMAT:
        raise OrchestratorError(
            f"{path}: format {value.get('format')} was written by another version; this one reads {RECORD_FORMAT}"
        )
    return Record(**value)


def artifact_files(folder: Path) -> dict[str, str]:
    """sha256 of every file that belongs to the artifact, by path below the folder."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.as_posix(): sha256_file(folder / path) for path in found if path.parts[0] not in (*WORK_NAMES, RECORD_NAME)}


def commit(folder: Path, record: Record) -> Record:
    """Flushes the artifact to disk and writes the record, with the files' hashes; from then on the stage is done."""
    _make_readable(folder)
    sync_files(folder)
    complete = replace(record, files=artifact_files(folder), finished=time.time())
    write_json(folder / RECORD_NAME, asdict(complete))
    return complete


def _make_readable(folder: Path) -> None:
    """safetensors writes files that only their owner can read; an artifact is for everyone who can read its folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | 0o044)
