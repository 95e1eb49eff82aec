"""The project's command while it runs: what it has done so far, its processes, and signals to them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.plan.checkpoints import checkpoint_steps
from orchestrator.store import sha256_file
from orchestrator.tracking import read_metrics
from orchestrator.tracking.ledger import read_ledger
from tests.integration.command import command_environment
from tests.shared_data import ROOT

STEPS = 30
SAVE_EVERY = 5
WORDS = (
    "stage=1",
    "tracking=none",
    "workers=2",
    f"stages.embeddings.steps={STEPS}",
    f"checkpoint.every_steps={SAVE_EVERY}",
)
"""The small stage."""

_LOOK_SECONDS = 0.02


class Running:
    """`python launch/run.py …` in a folder, training the stage of that name."""

    def __init__(self, words: Sequence[str], folder: Path, stage: str) -> None:
        self._folder, self._name = folder, stage
        self.output_file = folder / "output.txt"
        with self.output_file.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "launch" / "run.py"), *words],
                cwd=folder,
                env=command_environment(folder),
                stdout=output,
                stderr=output,
                # As in a terminal: Ctrl-C reaches the command and all that it started.
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.output_file.read_text(encoding="utf-8")

    @property
    def stage(self) -> Path:
        (found,) = (self._folder / "runs").glob(f"{self._name}-????????????")
        return found

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        found = list((self._folder / "runs").glob(f"{self._name}-????????????/ledger.jsonl"))
        events = read_ledger(found[0]) if found else []
        return [event for event in events if kind in (None, event["event"])]

    def losses(self) -> list[tuple[int, float]]:
        return [(row["step"], row["loss"]) for row in read_metrics(self.stage / "metrics.jsonl")]

    def step(self) -> int:
        """The newest step in the metrics."""
        files = list((self._folder / "runs").glob(f"{self._name}-????????????/metrics.jsonl"))
        rows = read_metrics(files[0]) if files else []
        return rows[-1]["step"] if rows else 0

    def checkpoints(self) -> list[int]:
        return checkpoint_steps(self.stage)

    def rank_pid(self, rank: int) -> int:
        """The training process whose output goes to that rank's log."""
        log = str(self.stage / "logs" / f"rank-{rank}.log")
        found = [pid for pid in _processes() if _target(pid, 1) == log]
        assert len(found) == 1, f"{len(found)} processes write {log}"
        return found[0]

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = 90) -> float:
        """The time at which it came true; AssertionError with the output so far when it does not."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None and not condition():
                raise AssertionError(f"ended with {self.process.returncode} before {what}:\n{self.output}")
            assert time.monotonic() < deadline, f"{what}: not within {seconds} seconds:\n{self.output}"
            time.sleep(_LOOK_SECONDS)
        return time.time()

    def wait_for_step(self, step: int, seconds: float = 90) -> float:
        return self.wait_until(lambda: self.step() >= step, f"step {step}", seconds)

    def wait_for_checkpoint(self, step: int, seconds: float = 90) -> None:
        self.wait_until(
            lambda: any(event["step"] >= step for event in self.events("checkpoint")), f"checkpoint {step}", seconds
        )

    def wait(self, seconds: float = 180) -> int:
        return self.process.wait(seconds)

    def end(self) -> None:
        """Whatever is left of the command and what it started, by their session."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@dataclass(frozen=True)
class Undisturbed:
    """What a stage comes to when nothing happens."""

    losses: list[tuple[int, float]]
    adapter: str
    """sha256 of its tensors."""


def assert_nothing_was_lost(command: Running, undisturbed: Undisturbed) -> None:
    """The same losses at the same steps, each step once, and the same adapter, all to the bit."""
    assert command.losses() == undisturbed.losses
    assert sha256_file(command.stage / "adapter" / "adapter_model.safetensors") == undisturbed.adapter
    assert not (command.stage / "checkpoints").exists()


@contextmanager
def running(words: Sequence[str], folder: Path, stage: str = "embeddings") -> Iterator[Running]:
    """A command for the length of a `with`; what is still running then is killed."""
    command = Running(words, folder, stage)
    try:
        yield command
    finally:
        command.end()


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _target(pid: int, descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{descriptor}")
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return ""
