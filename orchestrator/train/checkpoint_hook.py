"""When the training state is saved: every so many steps, when a rank asks for it, before leaving, and at the end."""

from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.checkpoint.writer import CheckpointWriter
from orchestrator.engine import StateStream, StepResult
from orchestrator.train.loop import Progress


class CheckpointHook:
    """A hook of every rank: all gather the state, and the one with a writer keeps it."""

    def __init__(
        self,
        state: Callable[[bool], StateStream],
        writer: CheckpointWriter | None,
        describe: Callable[[Progress, Mapping[str, int | float]], Mapping[str, Any]],
        every_steps: int | None,
        num_steps: int,
        best: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`state(keep)` is collective; `describe` gives what the checkpoint says beside its tensors, as JSON values, from
        the progress and the state's numbers. The state of the step that `best` names is saved and stays."""
        self._state, self._writer, self._describe, self._best = state, writer, describe, best
        self._every_steps, self._num_steps = every_steps, num_steps

    def after_step(self, progress: Progress, result: StepResult) -> None:
        # What NaN has touched is not worth keeping, and must not push out what is.
        if result.is_bad or not self._is_due(progress, result):
            return
        state = self._state(self._writer is not None)
        if self._writer:
            description = self._describe(progress, state.numbers)
            best = self._best()
            wait = result.wishes.stop or progress.step == best
            self._writer.save(progress.step, state.tensors, description, wait, () if best is None else (best,))
        else:
            state.tensors.drop()

    def _is_due(self, progress: Progress, result: StepResult) -> bool:
        by_steps = self._every_steps is not None and progress.step % self._every_steps == 0
        return by_steps or result.wishes.save or result.wishes.stop or progress.step in (self._num_steps, self._best())
