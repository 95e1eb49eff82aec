"""What training is: batches into an engine until the schedule is spent, and hooks that are told."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.data.batches import StepBatch
from orchestrator.engine import Engine, StepResult
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


def train(
    engine: Engine, batches: Iterator[StepBatch], schedule: Schedule, hooks: Sequence[Hook], progress: Progress
) -> Progress:
    """Trains until the schedule is spent; all ranks must call."""
    while not schedule.is_spent(progress.step):
        result = engine.step(next(batches), schedule.learning_rate(progress.step), inspect=progress.step < INSPECTED_STEPS)
        progress = progress.after(result.num_tokens)
        for hook in hooks:
            hook.after_step(progress, result)
    return progress
