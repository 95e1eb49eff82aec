"""What happens to the command itself: killed, interrupted, its Ray killed, started twice."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import Measure
from tests.faults.running import SAVE_EVERY, WORDS, Undisturbed, assert_nothing_was_lost, running
from tests.integration.command import run_command

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

RESTART_SECONDS = 30
"""From the death of the command to the next optimizer step, on two cores, when somebody starts it again at once."""


def test_after_the_command_was_killed_the_same_command_goes_on(
    folder: Path, undisturbed: Undisturbed, measure: Measure
) -> None:
    with running(WORDS, folder) as command:
        command.wait_for_checkpoint(2 * SAVE_EVERY)
        ranks = [command.rank_pid(rank) for rank in (0, 1)]
        killed = time.time()
        command.process.kill()
        command.process.wait()
        with running(WORDS, folder) as again:
            assert "RESUME" not in again.output
            resumed = again.wait_until(lambda: len(again.events("first_step")) == 2, "the next step")
            assert not any(psutil.pid_exists(rank) for rank in ranks)
            assert again.wait() == 0, again.output
            assert "goes on from step" in again.output
            measure("command killed and typed again, to the next step", resumed - killed)
            assert resumed - killed < RESTART_SECONDS
            assert_nothing_was_lost(again, undisturbed)


def test_a_supervised_command_starts_again_by_itself(folder: Path, undisturbed: Undisturbed, measure: Measure) -> None:
    with running([*WORDS, "supervise=true"], folder) as command:
        command.wait_for_checkpoint(SAVE_EVERY)
        (worker,) = psutil.Process(command.process.pid).children()
        killed = time.time()
        worker.kill()
        resumed = command.wait_until(lambda: len(command.events("first_step")) == 2, "the next step")
        measure("supervised command killed, to the next step", resumed - killed)
        assert resumed - killed < RESTART_SECONDS
        assert command.wait() == 0, command.output
        assert "was killed by signal 9; starting it again" in command.output
        assert_nothing_was_lost(command, undisturbed)


def test_a_supervised_command_outlives_the_head_of_its_cluster(
    folder: Path, undisturbed: Undisturbed, measure: Measure
) -> None:
    with running([*WORDS, "supervise=true"], folder) as command:
        command.wait_for_checkpoint(SAVE_EVERY)
        (head,) = [
            process
            for process in psutil.Process(command.process.pid).children(recursive=True)
            if process.name() == "gcs_server"
        ]
        killed = time.time()
        head.kill()
        resumed = command.wait_until(lambda: len(command.events("first_step")) == 2, "the next step")
        measure("Ray's head killed under a supervised command, to the next step", resumed - killed)
        assert resumed - killed < RESTART_SECONDS
        assert command.wait() == 0, command.output
        assert_nothing_was_lost(command, undisturbed)


def test_asked_to_stop_it_finishes_the_step_saves_and_says_how_to_go_on(
    folder: Path, undisturbed: Undisturbed, measure: Measure
) -> None:
    """By Ctrl-C, and once more by SIGTERM."""
    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM):
        with running(WORDS, folder) as command:
            at = command.step() + SAVE_EVERY + 2
            command.wait_for_step(at)
            if number == signal.SIGINT:
                # As a terminal does it: all processes of the group.
                os.killpg(command.process.pid, number)
            else:
                command.process.send_signal(number)
            asked = time.time()
            assert command.wait(30) == 128 + number
            measure(f"{number.name}, to the end with all saved", time.time() - asked)
            assert time.time() - asked < 15
            stopped.append(command.events("stop")[-1]["step"])
            assert command.checkpoints()[-1] == stopped[-1] >= at
            assert f"stopped by {number.name} at step {stopped[-1]} of" in command.output
            assert "the same command goes on from there" in command.output
            assert "Traceback" not in command.output
    with running(WORDS, folder) as again:
        assert again.wait() == 0, again.output
        assert [event["step"] for event in again.events("resumed")] == stopped
        assert again.events("failure") == []
        assert_nothing_was_lost(again, undisturbed)


def test_a_second_run_of_the_same_stage_says_who_holds_it(folder: Path, undisturbed: Undisturbed) -> None:
    with running(WORDS, folder) as command:
        command.wait_for_step(2)
        # Stopped, so that it cannot finish meanwhile.
        stopped = command.rank_pid(0)
        os.kill(stopped, signal.SIGSTOP)
        second = run_command(WORDS, folder)
        os.kill(stopped, signal.SIGCONT)
        assert second.returncode == 2
        assert f"is being run by {os.environ.get('USER', 'root')}@" in second.stderr
        assert f"(process {command.process.pid}) since " in second.stderr
        assert "Traceback" not in second.stderr
        assert command.wait() == 0, command.output
        assert_nothing_was_lost(command, undisturbed)


def test_a_mistake_is_not_tried_again(folder: Path) -> None:
    with running(
        [*WORDS, "supervise=true", "stages.embeddings.method={kind: lora, targets: [q_prog], rank: 4, alpha: 8}"], folder
    ) as command:
        assert command.wait(60) == 2
        assert command.output.count("q_prog names no linear layer") == 1
        assert "starting it again" not in command.output
