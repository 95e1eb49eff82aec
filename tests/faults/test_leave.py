"""What a machine does before it goes: whoever trains on it moves away, and a command that runs on it saves and stops."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.nodes import cluster_of, needs_namespaces
from tests.faults.running import SAVE_EVERY, WORDS, Undisturbed, assert_nothing_was_lost, running
from tests.integration.command import command_environment
from tests.shared_data import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400), needs_namespaces]

ALONE = f"""
{sys.executable} {ROOT}/launch/run.py {" ".join(WORDS)} supervise=true & command=$!
while [ "$(cat runs/embeddings-*/metrics.jsonl | wc -l)" -lt {SAVE_EVERY + 2} ]; do sleep 0.1; done
{sys.executable} -m orchestrator.cluster.leave 30; echo "left with $?"
wait $command; echo "ended with $?"
"""
"""A command and who asks it to stop, and nobody else, as in a pod."""


def test_its_nodes_are_drained_and_it_waits_until_they_are_left(folder: Path, undisturbed: Undisturbed) -> None:
    """The two nodes that train are of one machine here, and so both go."""
    with cluster_of(folder, 4, apart=True) as nodes:
        words = [*WORDS, "cluster=address", f"cluster.address={nodes.address}", "recovery.max_failures=0"]
        with running(words, folder) as command:
            command.wait_for_step(SAVE_EVERY + 2)
            nodes.leave(seconds=60)
            assert command.wait() == 0, command.output
            assert [event["cause"] for event in command.events("failure")] == ["preemption"]
            first, second = (set(event["nodes"]) for event in command.events("attempt"))
            assert first.isdisjoint(second)
            assert_nothing_was_lost(command, undisturbed)


def test_a_command_saves_and_stops_and_goes_on_elsewhere(folder: Path, undisturbed: Undisturbed) -> None:
    completed = subprocess.run(
        ["unshare", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c", ALONE],
        cwd=folder,
        env=command_environment(folder) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "left with 0" in completed.stdout, completed.stdout + completed.stderr
    assert "ended with 143" in completed.stdout
    assert "stopped by SIGTERM at step" in completed.stderr
    with running(WORDS, folder) as again:
        assert again.wait() == 0, again.output
        assert again.events("stop")[0]["step"] == again.events("resumed")[0]["step"] > SAVE_EVERY
        assert_nothing_was_lost(again, undisturbed)
