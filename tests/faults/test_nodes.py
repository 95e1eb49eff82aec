"""What happens to the nodes of a cluster while a stage trains there: lost with another free or with none, or wanted back."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Measure
from tests.faults.nodes import Nodes, cluster_of
from tests.faults.running import SAVE_EVERY, STEPS, WORDS, Undisturbed, assert_nothing_was_lost, running

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

MOVE_SECONDS = 25
"""From the loss of a node to the next step on another, on two cores."""
SHRINK_SECONDS = 40
"""From the loss of a node to the next step with fewer workers."""


@pytest.fixture
def nodes(folder: Path) -> Iterator[Nodes]:
    with cluster_of(folder) as found:
        yield found


def words(nodes: Nodes, *more: str) -> list[str]:
    return [*WORDS, "cluster=address", f"cluster.address={nodes.address}", *more]


def test_when_a_node_is_lost_the_stage_moves_to_one_that_is_free(
    folder: Path, nodes: Nodes, undisturbed: Undisturbed, measure: Measure
) -> None:
    for _ in range(3):
        nodes.add()
    with running(words(nodes), folder) as command:
        command.wait_for_checkpoint(SAVE_EVERY)
        lost = command.events("attempt")[0]["nodes"][1]
        removed = time.time()
        nodes.remove(lost)
        again = command.wait_until(lambda: len(command.events("first_step")) == 2, "the next step")
        assert command.wait() == 0, command.output
        (failure,) = command.events("failure")
        assert (failure["cause"], failure["node"]) == ("node_lost", lost)
        first, second = (event["nodes"] for event in command.events("attempt"))
        assert lost in first
        assert lost not in second
        assert len(second) == 2
        assert_nothing_was_lost(command, undisturbed)
        measure("node lost with another free, to the next step", again - removed)
        assert again - removed < MOVE_SECONDS


def test_with_too_few_nodes_it_goes_on_with_fewer_workers_and_grows_again(
    folder: Path, nodes: Nodes, undisturbed: Undisturbed, measure: Measure
) -> None:
    for _ in range(2):
        nodes.add()
    more = f"stages.embeddings.steps={STEPS}"
    with running(words(nodes, "workers=1-2", more), folder) as command:
        command.wait_for_checkpoint(SAVE_EVERY)
        removed = time.time()
        nodes.remove(command.events("attempt")[0]["nodes"][1])
        again = command.wait_until(lambda: len(command.events("first_step")) == 2, "the next step")
        added = time.time()
        nodes.add()
        grown = command.wait_until(lambda: len(command.events("first_step")) == 3, "more workers")
        measure("node added, to the next step with more workers", grown - added)
        assert command.wait() == 0, command.output
        assert [event["workers"] for event in command.events("attempt")] == [2, 1, 2]
        assert [event["cause"] for event in command.events("failure")] == ["node_lost", "resize"]
        steps, losses = zip(*command.losses(), strict=True)
        assert steps == tuple(range(1, STEPS + 1))
        assert losses == pytest.approx([loss for _, loss in undisturbed.losses], abs=2e-3)
        measure("node lost with none free, to the next step with fewer workers", again - removed)
        assert again - removed < SHRINK_SECONDS


def test_a_preemption_notice_is_used_to_save_and_move_and_is_not_charged(
    folder: Path, nodes: Nodes, undisturbed: Undisturbed
) -> None:
    for _ in range(3):
        nodes.add()
    with running(words(nodes, "recovery.max_failures=0"), folder) as command:
        command.wait_for_step(SAVE_EVERY + 2)
        leaving = command.events("attempt")[0]["nodes"][1]
        nodes.drain(leaving, seconds=60)
        command.wait_until(lambda: len(command.events("attempt")) == 2, "another attempt")
        assert command.wait() == 0, command.output
        (failure,) = command.events("failure")
        assert failure["cause"] == "preemption"
        assert command.events("resumed")[0]["step"] == failure["step"]
        assert leaving not in command.events("attempt")[1]["nodes"]
        assert_nothing_was_lost(command, undisturbed)
