"""What a run writes down about each step."""

import resource
import time

import torch

from orchestrator.engine import StepResult
from orchestrator.tracking import MetricsFile, Mirror
from orchestrator.train.loop import Progress


class MetricsHook:
    """A hook of rank 0: one row per logged step in the metrics file, and the same to the mirror."""

    def __init__(self, file: MetricsFile, mirror: Mirror, every_steps: int, num_steps: int) -> None:
        self._file, self._mirror = file, mirror
        self._every_steps, self._num_steps = every_steps, num_steps
        self._since, self._tokens, self._steps = time.monotonic(), 0, 0

    def after_step(self, progress: Progress, result: StepResult) -> None:
        self._tokens += result.num_tokens
        self._steps += 1
        if progress.step % self._every_steps and progress.step != self._num_steps:
            return
        now = time.monotonic()
        seconds = now - self._since
        row = {
            "step": progress.step,
            "time": time.time(),
            "loss": result.loss,
            "tokens": progress.tokens,
            "tokens_per_second": self._tokens / seconds,
            "seconds": seconds / self._steps,
            "learning_rate": result.learning_rate,
            "gradient_norm": result.gradient_norm,
            "memory_bytes": peak_memory_bytes(),
        }
        self._file.write(row)
        self._mirror.log(progress.step, row)
        self._since, self._tokens, self._steps = now, 0, 0


def peak_memory_bytes() -> int:
    """The most this rank has held: allocated on its GPU, or resident where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
