"""Numbers that went wrong: a loss that is NaN or infinite, gradients that are, an fp16 loss scale that is spent."""

from collections.abc import Callable

from orchestrator.engine import StepResult
from orchestrator.errors import TrainingError
from orchestrator.train.loop import Progress


class BadStepCheck:
    """A hook: after `most` such steps in a row no good one will come. The newest checkpoint is from before them."""

    def __init__(self, most: int, describe_batch: Callable[[int], str]) -> None:
        """`describe_batch` names the samples of a step, from 0."""
        self._most, self._describe = most, describe_batch
        self._first: StepResult | None = None
        self._steps = 0

    def after_step(self, progress: Progress, result: StepResult) -> None:
        if not result.is_bad:
            self._first, self._steps = None, 0
            return
        self._first = self._first or result
        self._steps += 1
        if self._steps < self._most:
            return
        step, after = progress.step - self._steps, self._steps - 1
        no_better = f", and {after} more after it no better" if after else ""
        raise TrainingError(
            f"step {step + 1}: {_what(self._first)}{no_better}. It learned {self._describe(step)}. Look at these, or lower "
            f"the learning rate (it was {self._first.learning_rate:g}); the newest checkpoint is from before it"
        )


def _what(result: StepResult) -> str:
    if result.scale_is_spent:
        return "the gradients overflow in fp16 at the smallest loss scale"
    return f"loss {result.loss:g}, gradient norm {result.gradient_norm:g}"
