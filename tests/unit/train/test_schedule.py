"""The learning rate over the steps."""

from itertools import pairwise
from typing import Literal

import pytest

from orchestrator.train.schedule import Schedule


def rates(
    kind: Literal["cosine", "constant"] = "cosine", num_steps: int = 100, warmup_fraction: float = 0.1, peak: float = 1.0
) -> list[float]:
    schedule = Schedule(kind, peak, num_steps, warmup_fraction)
    return [schedule.learning_rate(step) for step in range(num_steps)]


def test_it_rises_in_equal_parts_to_its_peak() -> None:
    assert rates()[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])


def test_the_cosine_falls_from_the_peak_through_half_of_it_towards_zero() -> None:
    falling = rates()[10:]
    assert falling[0] == 1.0
    assert falling[45] == pytest.approx(0.5)
    assert 0 < falling[-1] < 0.001
    assert all(later < earlier for earlier, later in pairwise(falling))


def test_the_constant_stays_at_its_peak() -> None:
    assert rates("constant")[10:] == [1.0] * 90


@pytest.mark.parametrize("kind", ["cosine", "constant"])
@pytest.mark.parametrize(("num_steps", "warmup_fraction"), [(1, 0.0), (1, 0.9), (2, 0.5), (3, 0.99), (40, 0.05), (7, 0.03)])
def test_every_step_learns_and_none_above_the_peak(
    kind: Literal["cosine", "constant"], num_steps: int, warmup_fraction: float
) -> None:
    found = rates(kind, num_steps, warmup_fraction, peak=2e-4)
    assert all(0 < rate <= 2e-4 for rate in found)
    assert max(found) == 2e-4


def test_without_a_warm_up_the_first_step_has_the_peak() -> None:
    assert rates(warmup_fraction=0.0)[0] == 1.0


@pytest.mark.parametrize(("num_steps", "fraction", "steps"), [(3000, 0.05, 150), (40, 0.05, 2), (10, 0.01, 1), (10, 0.0, 0)])
def test_the_warm_up_is_its_share_of_the_steps_rounded_up(num_steps: int, fraction: float, steps: int) -> None:
    assert Schedule("cosine", 1.0, num_steps, fraction).warmup_steps == steps


def test_it_is_spent_after_its_steps() -> None:
    schedule = Schedule("cosine", 1.0, 10, 0.1)
    assert [schedule.is_spent(step) for step in (0, 9, 10, 11)] == [False, False, True, True]
