"""How the learning rate goes over the steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up, then a cosine to zero or a constant."""

    kind: Literal["cosine", "constant"]
    peak: float
    num_steps: int
    warmup_fraction: float
    is_enough: Callable[[], bool] = lambda: False
    """Whether it ends before its last step."""

    @property
    def warmup_steps(self) -> int:
        return math.ceil(self.num_steps * self.warmup_fraction)

    def is_spent(self, step: int) -> bool:
        return step >= self.num_steps or self.is_enough()

    def learning_rate(self, step: int) -> float:
        """Of the update after `step` finished ones; the first is above zero, so that every step learns."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        done = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        return self.peak * 0.5 * (1 + math.cos(math.pi * done))
