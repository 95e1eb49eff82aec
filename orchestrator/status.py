"""What is under a run root: stages that are done, run now, or were begun, here or in an object store."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from orchestrator.errors import RecipeError
from orchestrator.lease import InStore
from orchestrator.lease.held import LEASE_NAME
from orchestrator.lease.holder import Holder, is_gone, read_holder
from orchestrator.plan.record import RECORD_NAME, read_record
from orchestrator.remote import Remote
from orchestrator.run_root import RunRoot
from orchestrator.tracking.evaluations import EVALUATIONS_NAME
from orchestrator.tracking.ledger import LEDGER_NAME, read_ledger
from orchestrator.tracking.metrics import METRICS_NAME, read_metrics

State = Literal["done", "running", "stopped", "failed", "lost"]
_FILES = (RECORD_NAME, LEDGER_NAME, METRICS_NAME, EVALUATIONS_NAME, LEASE_NAME)


@dataclass(frozen=True)
class StageStatus:
    """A stage as its own files show it."""

    folder: str
    """Its name below the run root."""
    state: State
    """lost: its command ended without a word, and the same command goes on from what is saved."""
    pipeline: str
    """The recipe's name; empty where no command has said it."""
    step: int
    """Steps that are done, of those that count."""
    steps: int | None
    """In all, once workers have started."""
    loss: float | None
    changed: float
    """When something was last heard of it, in seconds since the epoch."""
    holder: str
    """Who runs it."""
    command: str
    """The last that was typed for it."""


def look(root: RunRoot) -> list[StageStatus]:
    """All stages, those that were changed last at the end. RecipeError where there is no such folder."""
    with looked_at(root) as folder:
        return statuses(folder)


@contextmanager
def looked_at(root: RunRoot) -> Iterator[Path]:
    """A folder with the files that say how each stage is; RecipeError where there is no such run root."""
    if root.url is None:
        if not root.local.is_dir():
            raise RecipeError(f"run_root: {root.local} is not there")
        yield root.local
        return
    with TemporaryDirectory() as folder:
        # The mirror stays as it is: a command of this machine may be working in it.
        _bring(Remote(root.url), Path(folder))
        yield Path(folder)


def statuses(folder: Path) -> list[StageStatus]:
    """Of what `looked_at` gives."""
    return sorted(_statuses(folder), key=lambda each: each.changed)


def _bring(remote: Remote, folder: Path) -> None:
    for stage in remote.folders(""):
        for name in _FILES:
            if (content := remote.read(f"{stage}/{name}")) is not None:
                (folder / stage).mkdir(exist_ok=True)
                (folder / stage / name).write_bytes(content)


def _statuses(root: Path) -> Iterator[StageStatus]:
    for folder in root.iterdir():
        # Prepared data and the like have neither.
        if (folder / LEDGER_NAME).is_file() or (folder / RECORD_NAME).is_file():
            yield _status(folder)


def _status(folder: Path) -> StageStatus:
    record, events, rows = read_record(folder), read_ledger(folder / LEDGER_NAME), read_metrics(folder / METRICS_NAME)
    holder = None if record else _holder(folder)
    state = "done" if record else "running" if holder else _ended(events)
    began: dict[str, Any] = next((event for event in reversed(events) if event["event"] == "begin"), {})
    attempt: dict[str, Any] = next((event for event in reversed(events) if event["event"] == "attempt"), {})
    heard = [record.finished if record else 0.0, *(each["time"] for each in (*events[-1:], *rows[-1:]) if "time" in each)]
    return StageStatus(
        folder=folder.name,
        state=state,
        pipeline=record.recipe["name"] if record else began.get("pipeline", ""),
        step=rows[-1]["step"] if rows else 0,
        steps=record.results.get("steps") if record else attempt.get("steps"),
        loss=rows[-1].get("loss") if rows else None,
        changed=max(heard),
        holder=str(holder) if holder else "",
        command=began.get("command", ""),
    )


def _holder(folder: Path) -> Holder | None:
    """Who runs the stage, as far as anyone can know who looks from here."""
    content = b""
    # It may be let go at this moment.
    with suppress(FileNotFoundError):
        content = (folder / LEASE_NAME).read_bytes()
    holder = read_holder(content)
    if holder is None or is_gone(holder):
        return None
    silent = time.time() - datetime.fromisoformat(holder.renewed).timestamp()
    return holder if is_gone(holder) is False or silent < InStore.expires_seconds else None


def _ended(events: Sequence[dict[str, Any]]) -> State:
    endings: dict[str, State] = {"stop": "stopped", "failure": "failed"}
    return endings.get(events[-1]["event"], "lost") if events else "lost"
