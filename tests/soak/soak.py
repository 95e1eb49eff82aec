"""Kills a run again and again at seeded random moments, until it is done, and counts what that cost."""

import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.tracking import read_metrics
from orchestrator.tracking.ledger import Summary, read_ledger, summarize
from tests.faults.running import Running, running

_TARGETS = ("rank 0", "rank 1", "forkserver", "worker", "command")
_MOMENTS = ("training", "saving", "starting")
_LOOK_SECONDS = 0.002


@dataclass(frozen=True)
class Soak:
    """How it went."""

    kills: Counter[str]
    """By moment and target."""
    summary: Summary
    wall_seconds: float
    losses: list[tuple[int, float]]
    committed: list[int]
    """The steps whose checkpoints were reported as committed, in that order."""
    resumed: list[int]

    def table(self) -> str:
        """For people, in Markdown."""
        recoveries = self.summary.recovery_seconds
        rows = [
            (
                "kills",
                f"{sum(self.kills.values())} ({', '.join(f'{count} {kind}' for kind, count in sorted(self.kills.items()))})",
            ),
            ("goodput (useful step time of wall time)", f"{self.summary.useful_seconds / self.wall_seconds:.0%}"),
            ("steps learned again", f"{self.summary.lost_steps}"),
            ("recovery, median", f"{statistics.median(recoveries):.1f} s"),
            ("recovery, worst", f"{max(recoveries):.1f} s"),
            ("wall time", f"{self.wall_seconds / 60:.1f} min"),
        ]
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def soak(words: list[str], folder: Path, kills: int, seed: int) -> Soak:
    """Runs a supervised command through so many kills, and then to its end."""
    dice = random.Random(seed)
    done: Counter[str] = Counter()
    started = time.monotonic()
    with running([*words, "supervise=true", f"recovery.max_failures={kills}"], folder) as command:
        while sum(done.values()) < kills and command.process.poll() is None:
            moment, target = dice.choice(_MOMENTS), dice.choice(_TARGETS)
            if _await(command, moment, dice.random()) and _kill(command, target):
                done[f"{target} while {moment}"] += 1
        assert command.wait(600) == 0, command.output
        wall = time.monotonic() - started
        events = read_ledger(command.stage / "ledger.jsonl")
        return Soak(
            kills=done,
            summary=summarize(events, read_metrics(command.stage / "metrics.jsonl")),
            wall_seconds=wall,
            losses=command.losses(),
            committed=[event["step"] for event in events if event["event"] == "checkpoint"],
            resumed=[event["step"] for event in events if event["event"] == "resumed"],
        )


def _await(command: Running, moment: str, fraction: float) -> bool:
    """Waits for the moment; False when the run ended first."""
    if moment == "starting":
        known = len(command.events("attempt"))
        return _wait(command, lambda: len(command.events("attempt")) > known or _is_training(command)) and _sleep(
            fraction * 4
        )
    if not _wait(command, lambda: _is_training(command)):
        return False
    if moment == "training":
        return _sleep(fraction * 2)
    # The folder of a checkpoint that is being written is there for some hundredths of a second.
    checkpoints = command.stage / "checkpoints"
    return _wait(command, lambda: any(checkpoints.glob(".*.partial"))) and _sleep(fraction * 0.06)


def _is_training(command: Running) -> bool:
    events = [event["event"] for event in command.events()]
    started = len(events) - 1 - events[::-1].index("attempt") if "attempt" in events else len(events)
    return "first_step" in events[started:] and not {"failure", "finish"} & set(events[started:])


def _wait(command: Running, condition: Callable[[], object]) -> bool:
    while not condition():
        if command.process.poll() is not None:
            return False
        time.sleep(_LOOK_SECONDS)
    return True


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return True


def _kill(command: Running, target: str) -> bool:
    """False when there is no such process at the moment."""
    try:
        os.kill(_pid(command, target), signal.SIGKILL)
    except (AssertionError, ProcessLookupError, psutil.NoSuchProcess, ValueError):
        return False
    return True


def _pid(command: Running, target: str) -> int:
    if target == "command":
        (watched,) = psutil.Process(command.process.pid).children()
        return watched.pid
    rank = psutil.Process(command.rank_pid(int(target[-1]) if target.startswith("rank") else 0))
    if target.startswith("rank"):
        return rank.pid
    if target == "forkserver":
        return rank.ppid()
    workers = [each for each in psutil.Process(command.process.pid).children(recursive=True) if _holds_a_rank(each)]
    assert workers
    return workers[0].pid


def _holds_a_rank(process: psutil.Process) -> bool:
    return bool(words := process.cmdline()) and words[0].startswith("ray::Worker")
