"""What happens to the processes that train, while they train: killed, stopped, asked to leave, out of memory."""

import os
import resource
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import Measure
from tests.faults.running import SAVE_EVERY, WORDS, Undisturbed, assert_nothing_was_lost, running

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

KILL_SECONDS = 15
"""From the kill of a rank to the next optimizer step, on two cores."""
HANG_SECONDS = 8


def test_a_killed_rank_starts_again_from_the_newest_checkpoint(
    folder: Path, undisturbed: Undisturbed, measure: Measure
) -> None:
    """Once the one that opens the meeting place and writes the checkpoints, and once the other."""
    with running(WORDS, folder) as command:
        for rank in (0, 1):
            command.wait_until(lambda: command.step() >= (rank + 1) * (SAVE_EVERY + 2), "a step")  # noqa: B023
            killed = time.time()
            os.kill(command.rank_pid(rank), signal.SIGKILL)
            again = command.wait_until(lambda: len(command.events("first_step")) == rank + 2, "the next step")  # noqa: B023
            measure(f"rank {rank} killed, to the next step", again - killed)
            assert again - killed < KILL_SECONDS
        assert command.wait() == 0, command.output
        for rank, failure, resumed in zip((0, 1), command.events("failure"), command.events("resumed"), strict=True):
            assert (failure["cause"], failure["rank"], failure["message"]) == ("worker_lost", rank, "was killed by signal 9")
            assert failure["step"] >= resumed["step"] >= (rank + 1) * SAVE_EVERY - SAVE_EVERY
            assert f"rank {rank} on" in command.output
        assert_nothing_was_lost(command, undisturbed)


def test_a_stopped_process_is_noticed_named_and_replaced(folder: Path, undisturbed: Undisturbed, measure: Measure) -> None:
    with running([*WORDS, f"recovery.hang_seconds={HANG_SECONDS}"], folder) as command:
        command.wait_for_step(SAVE_EVERY + 2)
        stopped = time.time()
        os.kill(command.rank_pid(1), signal.SIGSTOP)
        noticed = command.wait_until(lambda: command.events("failure"), "the hang to be noticed", seconds=HANG_SECONDS + 20)
        measure(f"rank stopped, to the restart (recovery.hang_seconds={HANG_SECONDS})", noticed - stopped)
        assert noticed - stopped < HANG_SECONDS + 10
        assert command.wait() == 0, command.output
        (failure,) = command.events("failure")
        assert (failure["cause"], failure["rank"]) == ("hang", 1)
        assert "was stopped (SIGSTOP)" in command.output
        assert "most recent call first" in command.output
        assert_nothing_was_lost(command, undisturbed)


def test_a_rank_that_gets_sigterm_takes_the_others_with_it_saves_and_goes_on(folder: Path, undisturbed: Undisturbed) -> None:
    with running([*WORDS, "recovery.max_failures=0"], folder) as command:
        command.wait_for_step(SAVE_EVERY + 2)
        os.kill(command.rank_pid(1), signal.SIGTERM)
        assert command.wait() == 0, command.output
        (failure,) = command.events("failure")
        assert failure["cause"] == "preemption"
        assert command.events("resumed")[0]["step"] == failure["step"] > SAVE_EVERY
        assert_nothing_was_lost(command, undisturbed)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_global_one(folder: Path, undisturbed: Undisturbed) -> None:
    with running(WORDS, folder) as command:
        command.wait_for_step(SAVE_EVERY + 2)
        pid = command.rank_pid(0)
        used = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        # From here on the kernel refuses this process any more memory.
        resource.prlimit(pid, resource.RLIMIT_AS, (used, used))
        assert command.wait() == 0, command.output
        first, second = command.events("attempt")
        assert (first["micro_batch_size"], second["micro_batch_size"]) == (4, 2)
        assert second["accumulation"] == 2 * first["accumulation"]
        assert [failure["cause"] for failure in command.events("failure")] == ["out_of_memory"]
        steps, losses = zip(*command.losses(), strict=True)
        assert steps == tuple(step for step, _ in undisturbed.losses)
        assert losses == pytest.approx([loss for _, loss in undisturbed.losses], abs=2e-3)


def test_ranks_that_keep_dying_end_the_run_with_a_budget(folder: Path) -> None:
    words = [*WORDS, "recovery.max_failures=1", "checkpoint.every_steps=1000"]
    with running(words, folder) as command:
        for attempt in (1, 2):
            command.wait_until(lambda: len(command.events("first_step")) == attempt, f"attempt {attempt}")  # noqa: B023
            os.kill(command.rank_pid(0), signal.SIGKILL)
            command.wait_until(lambda: len(command.events("failure")) == attempt, f"failure {attempt}")  # noqa: B023
        assert command.wait() == 75
        assert "failure 2 in a row without a new checkpoint" in command.output
        assert "Traceback" not in command.output
