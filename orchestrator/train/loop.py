"""What training is: batches into an engine until the schedule is spent, and hooks that are told."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from orchestrator.data.batches import StepBatches
from orchestrator.engine import Engine, StepResult, Wishes
from orchestrator.train.link import Phase
from orchestrator.train.schedule import Schedule

INSPECTED_STEPS = 2
"""Steps whose gradients are looked at one by one; B of LoRA starts at zero, so A has a gradient from the second on."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0

    def after(self, num_tokens: int) -> "Progress":
        return Progress(self.step + 1, self.tokens + num_tokens)


class Hook(Protocol):
    """Is told of each step; gets values only."""

    def after_step(self, progress: Progress, result: StepResult) -> None: ...


class Pulse(Protocol):
    """Shows that this rank is alive, and what it was asked from outside."""

    def beat(self, step: int, phase: Phase) -> None: ...

    def wishes(self) -> Wishes: ...


def train(
    engine: Engine, batches: StepBatches, schedule: Schedule, hooks: Sequence[Hook], progress: Progress, pulse: Pulse
) -> Progress:
    """Trains until the schedule is spent or a rank was asked to stop; all ranks must call."""
    while not schedule.is_spent(progress.step):
        pulse.beat(progress.step, "reading its batch")
        started = time.perf_counter()
        batch = batches.of_step(progress.step)
        reading = time.perf_counter() - started
        pulse.beat(progress.step, "computing")
        learning_rate, inspect = schedule.learning_rate(progress.step), progress.step < INSPECTED_STEPS
        result = engine.step(batch, learning_rate, progress.step, inspect, pulse.wishes())
        result = replace(result, seconds={"reading": reading, **result.seconds})
        progress = progress.after(result.num_tokens)
        pulse.beat(progress.step, "between steps")
        for hook in hooks:
            hook.after_step(progress, result)
        if result.wishes.stop:
            break
    return progress
