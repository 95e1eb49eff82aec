"""When held-out sets are measured, which state is the best by them, and when a stage has waited long enough."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.engine import StepResult
from orchestrator.schema import KeepBest
from orchestrator.train.evaluations import Evaluations
from orchestrator.train.loop import Progress

GOOD = StepResult(loss=2.5, gradient_norm=0.5, learning_rate=3e-4, num_tokens=8, num_targets=8)
NUM_STEPS = 12


class Training:
    """Steps whose held-out loss is given, told as the loop tells them."""

    def __init__(self, losses: dict[int, float], every_steps: int | None, keep: KeepBest | None, earlier: Any = ()) -> None:
        self.told: list[list[int]] = []
        self._losses = losses
        self.hook = Evaluations(self._measure, self._tell, every_steps, keep, NUM_STEPS, earlier)
        self.steps = max((row["step"] for row in earlier), default=0)

    def _measure(self, progress: Progress) -> dict[str, Any]:
        return {"held_out": {"validation": {"loss": self._losses.get(progress.step, 9.0)}}, "samples": []}

    def _tell(self, rows: Sequence[dict[str, Any]]) -> None:
        self.told.append([row["step"] for row in rows])

    def run(self, bad: Sequence[int] = ()) -> int:
        """The step at which it ended."""
        while self.steps < NUM_STEPS and not self.hook.is_over():
            self.steps += 1
            result = replace(GOOD, loss=math.nan) if self.steps in bad else GOOD
            self.hook.after_step(Progress(self.steps, 8 * self.steps), result)
        return self.steps


def keep(every_steps: int, patience: int | None = None) -> KeepBest:
    return KeepBest(every_steps=every_steps, patience=patience)


@pytest.mark.parametrize(
    ("every_steps", "kept", "measured"),
    [(None, None, []), (5, None, [5, 10, 12]), (None, keep(4), [4, 8, 12]), (5, keep(4), [4, 5, 8, 10, 12])],
)
def test_it_measures_every_so_many_steps_and_after_the_last(
    every_steps: int | None, kept: KeepBest | None, measured: list[int]
) -> None:
    training = Training({}, every_steps, kept)
    training.run()
    assert [row["step"] for row in training.hook.rows] == measured
    assert training.told == [measured[: number + 1] for number in range(len(measured))]


def test_the_best_is_the_least_loss_of_those_that_are_judged() -> None:
    # Step 5 is measured, but not one of those by which the state is chosen.
    training = Training({3: 4.0, 5: 0.5, 6: 2.0, 9: 3.0, 12: 2.0}, every_steps=5, keep=keep(3))
    training.run()
    assert training.hook.best() == 6
    assert training.hook.best_first() == [6, 12, 9, 3]


def test_without_a_wish_for_the_best_there_is_none_and_no_end() -> None:
    training = Training({}, every_steps=1, keep=None)
    assert training.run() == NUM_STEPS
    assert (training.hook.best(), training.hook.is_over()) == (None, False)


@pytest.mark.parametrize(("patience", "end"), [(1, 6), (2, 8), (3, 10), (None, 12)])
def test_it_ends_after_so_many_measurements_that_were_no_better(patience: int | None, end: int) -> None:
    training = Training({2: 3.0, 4: 2.0, 6: 2.0, 8: 2.5, 10: 2.5, 12: 1.0}, None, keep(2, patience))
    assert training.run() == end


def test_one_that_goes_on_decides_as_if_it_had_not_stopped() -> None:
    losses = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.5}
    straight = Training(losses, None, keep(2, 2))
    assert straight.run() == 8
    earlier = [row for row in straight.hook.rows if row["step"] <= 6]
    resumed = Training(losses, None, keep(2, 2), earlier)
    assert resumed.run() == 8
    assert resumed.hook.best_first() == straight.hook.best_first()


def test_nan_is_never_the_best_and_a_bad_step_is_not_measured() -> None:
    training = Training({2: math.nan, 4: 5.0, 6: 1.0}, None, keep(2))
    training.run(bad=[6])
    assert training.hook.best() == 4
    assert 6 not in [row["step"] for row in training.hook.rows]


def test_what_was_measured_is_found_by_its_step() -> None:
    training = Training({4: 1.5}, 4, None)
    training.run()
    assert training.hook.held_out_of(4) == {"validation": {"loss": 1.5}}
    assert training.hook.held_out_of(5) is None
