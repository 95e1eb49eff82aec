"""What happens to the nodes of a cluster while a stage trains there: lost with another free or with none, or wanted back."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Measure
from tests.faults.running import SAVE_EVERY, STEPS, WORDS, Undisturbed, assert_nothing_was_lost, running
from tests.integration.command import command_environment

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

MOVE_SECONDS = 25
"""From the loss of a node to the next step on another, on two cores."""
SHRINK_SECONDS = 40
"""From the loss of a node to the next step with fewer workers."""


class Nodes:
    """A Ray cluster of nodes with one CPU each, and a head with none."""

    def __init__(self, folder: Path, temporary: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("cluster_process.py"))],
            env=command_environment(folder) | {"RAY_TMPDIR": temporary},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "cluster.log").open("w"),
            text=True,
        )
        self.address = self._answer()

    def add(self) -> str:
        """The address of a new node."""
        return self._ask("add")

    def remove(self, address: str) -> None:
        """As if its power were cut: its raylet and all its processes are killed."""
        assert self._ask(f"remove {address}") == "removed"

    def drain(self, address: str, seconds: float) -> None:
        """A preemption notice."""
        assert self._ask(f"drain {address} {seconds}") == "draining"

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)

    def _ask(self, line: str) -> str:
        assert self._process.stdin
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout
        for line in self._process.stdout:
            # Ray also prints there.
            if line.startswith(("127.", "removed", "draining")) or line.strip().rpartition(":")[2].isdecimal():
                return line.strip()
        raise AssertionError("the cluster ended")


@pytest.fixture
def nodes(folder: Path) -> Iterator[Nodes]:
    with tempfile.TemporaryDirectory(prefix="nodes-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        (Path(temporary) / "ray").mkdir()
        found = Nodes(folder, temporary)
        try:
            yield found
        finally:
            found.close()


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
