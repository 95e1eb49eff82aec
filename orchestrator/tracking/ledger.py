"""What happened to a stage, across any number of commands: an append-only file, one JSON object per line.

The driver alone writes it. Each line is on disk before the driver goes on; what a killed driver wrote of its last line is no
event. An event has its `time` in seconds since the epoch, its name, and:

    begin                      pid, host, command, pipeline; step, if known: the last in the metrics.  A command starts or
                               resumes it.
    attempt                    workers, steps, zero, micro_batch_size, accumulation, nodes; from_step, if known
    learns                     kinds: by module, how many parameters learn, and of how many
    resumed                    step: that of the checkpoint from which an attempt goes on
    first_step                 step: the first that an attempt did
    checkpoint                 step, bytes, seconds
    checkpoint_skipped         step, reason
    checkpoint_failed          step, error
    checkpoint_cleanup_failed  step, error: an older one could not be removed
    damaged                    what: a checkpoint that was passed over
    failure                    cause, step: the last that was done; rank, node, message.  As a command's last event, its end.
    stop                       reason, step: a person or the system asked for it, and what was learned is saved
    finish                     step

The cause of a failure is worker_lost, node_lost, hang, out_of_memory, network, storage, error, preemption, resize or
driver_lost. The last may be left for nobody to write: a command that ended with neither failure, stop nor finish counts as
one when the next begins. It is then dated by its last event, since nothing later is known; the last step that it did is the
latest of which any event speaks.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from orchestrator.errors import DataError, StorageError
from orchestrator.store import sync_folder

LEDGER_NAME = "ledger.jsonl"
_ENDINGS = ("failure", "stop", "finish")


class Ledger:
    """Appends events, for one thread; each is on disk when `write` returns. Raises StorageError where it cannot be."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._size = sum(len(line) + 1 for line in _complete_lines(path))
            # Unbuffered: a buffer would write what a failed write left in it together with the next line.
            self._file = path.open("ab", buffering=0)
            sync_folder(path.parent)
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, event: str, **fields: Any) -> None:
        line = (
            json.dumps({"time": time.time(), "event": event, **fields}, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        )
        try:
            # Drops what a killed writer, or a write that failed, left of its line.
            self._file.truncate(self._size)
            rest = line
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error
        self._size += len(line)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _unwritable(self, error: OSError) -> StorageError:
        return StorageError(f"{self._path}: cannot be written: {error.strerror}")


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The events in order; none if there is no file. Raises DataError naming file:line."""
    return [_event(line, path, number) for number, line in enumerate(_complete_lines(path), start=1)]


@dataclass(frozen=True)
class Summary:
    """What it took to bring a stage to where it is."""

    commands: int
    attempts: int
    failures: Mapping[str, int]
    """By cause, in the order in which they first came."""
    lost_steps: int
    """Steps that were done and had to be done again."""
    recovery_seconds: tuple[float, ...]
    """From each failure to the next first step; failures on the way there prolong it, a stop ends it uncounted."""
    useful_seconds: float
    """In steps that count: those of the metrics file, in which a resumed run has replaced what it did again."""
    wall_seconds: float
    """While a command ran, from its begin to its last event."""

    @property
    def goodput(self) -> float:
        """The useful part of the wall time. At most 1, also while steps are newer than the last event; 0 before all."""
        return min(1.0, self.useful_seconds / self.wall_seconds) if self.wall_seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "recovery_seconds": list(self.recovery_seconds), "goodput": self.goodput}


def summarize(events: Sequence[Mapping[str, Any]], metrics_rows: Sequence[Mapping[str, Any]]) -> Summary:
    """`metrics_rows` have a `step` and its `seconds`, the mean over the steps since the row before."""
    commands = _commands(events)
    completed = _with_lost_drivers(commands)
    return Summary(
        commands=len(commands),
        attempts=sum(event["event"] == "attempt" for event in events),
        failures=dict(Counter(event["cause"] for event in completed if event["event"] == "failure")),
        lost_steps=_lost_steps(completed),
        recovery_seconds=_recoveries(completed),
        useful_seconds=_useful_seconds(metrics_rows),
        # The clock may have been set back.
        wall_seconds=sum(max(0.0, command[-1]["time"] - command[0]["time"]) for command in commands),
    )


def _commands(events: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    commands: list[list[Mapping[str, Any]]] = []
    for event in events:
        if event["event"] == "begin" or not commands:
            commands.append([])
        commands[-1].append(event)
    return commands


def _with_lost_drivers(commands: Sequence[Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """All events, with the failures that nobody was left to write."""
    if not commands:
        return []
    completed = list(commands[0])
    for before, after in pairwise(commands):
        if before[-1]["event"] not in _ENDINGS:
            completed.append({"time": before[-1]["time"], "event": "failure", "cause": "driver_lost"})
        completed.extend(after)
    return completed


def _lost_steps(events: Sequence[Mapping[str, Any]]) -> int:
    """Counted at each first step: where an attempt went on is known for certain once it has."""
    lost = done = 0
    for event in events:
        step = event.get("step") or 0
        if event["event"] == "first_step":
            lost += max(0, done - (step - 1))
            done = step
        else:
            done = max(done, step)
    return lost


def _recoveries(events: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    recoveries = []
    failed: float | None = None
    for event in events:
        match event["event"]:
            case "failure" if failed is None:
                failed = event["time"]
            case "first_step" if failed is not None:
                recoveries.append(max(0.0, event["time"] - failed))
                failed = None
            case "stop":
                failed = None
    return tuple(recoveries)


def _useful_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    useful, before = 0.0, 0
    for row in rows:
        useful += row["seconds"] * (row["step"] - before)
        before = row["step"]
    return useful


def _complete_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _event(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: not JSON ({error}); remove the line to read the others") from error
    if (
        not isinstance(event, dict)
        or not isinstance(event.get("event"), str)
        or not isinstance(event.get("time"), float | int)
    ):
        raise DataError(f"{path}:{number}: not an event with a name and a time; remove the line to read the others")
    return event
