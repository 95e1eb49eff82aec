"""What a run writes down about each step."""

import resource
import time
from collections import Counter
from dataclasses import dataclass

import torch

from orchestrator.engine import StepResult
from orchestrator.model.flops import StepFlops
from orchestrator.tracking import MetricsFile, Mirror
from orchestrator.train.loop import Progress


@dataclass(frozen=True)
class Utilisation:
    """What share of the devices' peak the model's own operations take."""

    flops: StepFlops
    seen: float
    """Tokens that a token sees, on average over the data."""
    peak: float
    """Operations per second of all devices together."""

    def of(self, tokens: int, targets: int, seconds: float) -> float:
        return self.flops.of(tokens, targets, self.seen) / seconds / self.peak


class MetricsHook:
    """A hook of rank 0: one row per logged step in the metrics file, and the same to the mirror."""

    def __init__(
        self, file: MetricsFile, mirror: Mirror, every_steps: int, num_steps: int, utilisation: Utilisation
    ) -> None:
        self._file, self._mirror, self._utilisation = file, mirror, utilisation
        self._every_steps, self._num_steps = every_steps, num_steps
        self._begin()

    def _begin(self) -> None:
        """Counts anew, from now on."""
        self._since, self._tokens, self._targets, self._steps = time.monotonic(), 0, 0, 0
        self._parts: Counter[str] = Counter()

    def after_step(self, progress: Progress, result: StepResult) -> None:
        self._tokens += result.num_tokens
        self._targets += result.num_targets
        self._steps += 1
        self._parts.update(result.seconds)
        if progress.step % self._every_steps and progress.step != self._num_steps:
            return
        seconds = time.monotonic() - self._since
        parts = {f"{part}_seconds": spent / self._steps for part, spent in self._parts.items()}
        # What looks at the first steps is among it, and what begins and ends a stage.
        parts["other_seconds"] = max(0.0, seconds / self._steps - sum(parts.values()))
        row = {
            "step": progress.step,
            "time": time.time(),
            "loss": result.loss,
            "tokens": progress.tokens,
            "tokens_per_second": self._tokens / seconds,
            "seconds": seconds / self._steps,
            **parts,
            "flops_utilisation": self._utilisation.of(self._tokens, self._targets, seconds),
            "learning_rate": result.learning_rate,
            "gradient_norm": result.gradient_norm,
            "memory_bytes": peak_memory_bytes(),
        }
        self._file.write(row)
        self._mirror.log(progress.step, row)
        self._begin()


def peak_memory_bytes() -> int:
    """The most this rank has held: allocated on its GPU, or resident where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
