"""What is worked out about an attempt: who stands where, who holds the others up, what the others' failures follow from."""

from dataclasses import replace

import pytest

from orchestrator.cluster.attempt import hanging_rank, places
from orchestrator.cluster.failures import Cause, Failure, explains, first_cause
from orchestrator.cluster.group import Member
from orchestrator.cluster.messages import Beat, Died, Place, Report
from orchestrator.errors import TrainingError
from orchestrator.train.link import PHASES, Phase


def member(node: str) -> Member:
    return Member(None, node, f"address of {node}", ())


def report(step: int, phase: Phase, stopped: bool = False) -> Report:
    return Report(Beat(step, phase), 100.0, (), None, stopped)


def failure(cause: Cause, rank: int, at: float) -> Failure:
    return Failure(cause, rank, "127.0.0.1", 3, "", at=at)


def test_ranks_of_a_node_are_neighbours_and_counted_on_their_own() -> None:
    found = places([member(node) for node in ("b", "b", "b", "a", "c", "c")])
    assert [place.rank for place in found] == list(range(6))
    assert {place.num_workers for place in found} == {6}
    assert [place.local_rank for place in found] == [0, 1, 2, 0, 0, 1]
    assert [place.local_workers for place in found] == [3, 3, 3, 1, 2, 2]
    assert [place.node_rank for place in found] == [0, 0, 0, 1, 2, 2]
    assert [place.node for place in found] == [f"address of {node}" for node in ("b", "b", "b", "a", "c", "c")]


def test_one_worker_has_a_place() -> None:
    assert places([member("a")]) == [Place(0, 1, 0, 1, 0, "address of a")]


@pytest.mark.parametrize(
    ("standing", "hanging"),
    [
        ([(4, "between steps"), (3, "computing"), (4, "between steps")], 1),
        ([(3, "computing"), (3, "computing"), (3, "reading its batch")], 2),
        ([(3, "reading its batch"), (3, "between steps")], 1),
        ([(3, "computing"), (3, "between steps")], 1),
        # Before the first step, or the first after a restart.
        ([(0, "loading"), (0, "starting")], 1),
        ([(5, "evaluating"), (0, "loading")], 1),
        ([(5, "reading its batch"), (5, "evaluating")], 1),
        # After the last.
        ([(9, "evaluating"), (9, "between steps")], 1),
        ([(9, "saving"), (9, "evaluating")], 1),
        ([(3, "computing"), (3, "computing")], 0),
    ],
)
def test_the_rank_that_came_least_far_holds_up_the_others(standing: list[tuple[int, Phase]], hanging: int) -> None:
    assert hanging_rank({rank: report(*where) for rank, where in enumerate(standing)}) == hanging


def test_a_stopped_rank_holds_up_the_others_wherever_it_stands() -> None:
    assert hanging_rank({0: report(3, "computing"), 1: report(4, "between steps", stopped=True)}) == 1


def test_only_ranks_that_are_asked_about_are_named() -> None:
    assert hanging_rank({2: report(4, "computing"), 5: report(3, "computing")}) == 5


def test_every_phase_has_its_place() -> None:
    reports = {rank: report(3, phase) for rank, phase in enumerate(reversed(PHASES))}  # pyrefly: ignore[bad-argument-type]
    assert hanging_rank(reports) == len(PHASES) - 1


def test_what_a_person_can_change_comes_before_all_else() -> None:
    ours = replace(failure("error", 3, at=9.0), error=TrainingError("the loss is NaN"))
    assert first_cause([failure("out_of_memory", 0, at=1.0), failure("node_lost", 1, at=2.0), ours]) is ours


def test_a_failure_comes_before_those_that_it_brings_about() -> None:
    causes: list[Cause] = ["error", "hang", "worker_lost", "node_lost", "out_of_memory"]
    failures = [failure(cause, rank, at=float(rank)) for rank, cause in enumerate(causes)]
    while failures:
        assert first_cause(failures) is failures.pop()


def test_of_failures_alike_the_earliest_comes_first() -> None:
    broken_connection, wrong_shape = failure("error", 0, at=2.002), failure("error", 1, at=2.001)
    assert first_cause([broken_connection, wrong_shape]) is wrong_shape


@pytest.mark.parametrize(("cause", "is_explained"), [("error", False), ("worker_lost", True), ("hang", True)])
def test_an_error_of_the_program_may_follow_from_one_that_is_not_known_yet(cause: Cause, is_explained: bool) -> None:
    assert explains([failure("error", 0, 1.0), failure(cause, 1, 2.0)]) is is_explained


def test_an_error_of_ours_explains_itself() -> None:
    assert explains([replace(failure("error", 0, 1.0), error=TrainingError("the loss is NaN"))])


@pytest.mark.parametrize(
    ("died", "text"),
    [
        (Died(9, None), "was killed by signal 9"),
        (Died(None, 0), "exited with 0"),
        (Died(None, None), "left, nobody knows how"),
    ],
)
def test_a_death_is_told_as_far_as_it_is_known(died: Died, text: str) -> None:
    assert str(died) == text
