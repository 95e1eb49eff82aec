"""The held-out loss while a stage trains: measured every so many steps, and which state was the best by it."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orchestrator.engine import StepResult
from orchestrator.schema import KeepBest
from orchestrator.train.loop import Progress

Row = dict[str, Any]


class Evaluations:
    """A hook of every rank, all of which get the same numbers and so decide alike."""

    def __init__(
        self,
        measure: Callable[[Progress], Mapping[str, Any]],
        tell: Callable[[Sequence[Row]], None],
        every_steps: int | None,
        keep_best: KeepBest | None,
        num_steps: int,
        earlier: Sequence[Row] = (),
    ) -> None:
        """`measure` is collective and gives what a row holds beside its step and time: `held_out` by set, `samples`. `tell`
        hears all rows so far. `earlier` ones are those of the steps that a resumed stage has done."""
        self._measure, self._tell = measure, tell
        self._every_steps, self._keep, self._num_steps = every_steps, keep_best, num_steps
        self._rows = list(earlier)

    @property
    def rows(self) -> list[Row]:
        return list(self._rows)

    def after_step(self, progress: Progress, result: StepResult) -> None:
        # What NaN has touched is not saved, and so cannot be the best.
        if result.is_bad or not self._is_due(progress.step):
            return
        self._rows.append({"step": progress.step, "time": time.time(), **self._measure(progress)})
        self._tell(self._rows)

    def best_first(self) -> list[int]:
        """The steps that were judged, the least loss first; of like ones the earlier."""
        return [row["step"] for row in sorted(self._judged, key=self._loss)]

    def held_out_of(self, step: int) -> dict[str, dict[str, float]] | None:
        """What was measured at a step; None where nothing was."""
        return next((row["held_out"] for row in self._rows if row["step"] == step), None)

    def best(self) -> int | None:
        """The step of the best state so far."""
        return next(iter(self.best_first()), None)

    def is_over(self) -> bool:
        """Whether there was no better one for as long as the stage waits."""
        patience = self._keep.patience if self._keep else None
        best = self.best()
        if patience is None or best is None:
            return False
        return sum(row["step"] > best for row in self._judged) >= patience

    @property
    def _judged(self) -> list[Row]:
        if self._keep is None:
            return []
        every = self._keep.every_steps
        return [row for row in self._rows if row["step"] % every == 0 or row["step"] == self._num_steps]

    def _loss(self, row: Row) -> float:
        assert self._keep
        loss = row["held_out"][self._keep.of]["loss"]
        # NaN would compare as if it were the best.
        return loss if loss == loss else float("inf")

    def _is_due(self, step: int) -> bool:
        intervals = [self._every_steps, self._keep.every_steps if self._keep else None]
        wanted = [interval for interval in intervals if interval]
        return bool(wanted) and (step == self._num_steps or any(step % interval == 0 for interval in wanted))
