"""What happens to checkpoints: a full disk while they are written, damage before they are read."""

import resource
import signal
from pathlib import Path

import pytest

from tests.faults.running import SAVE_EVERY, WORDS, Running, Undisturbed, assert_nothing_was_lost, running

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


def fill_the_disk(command: Running) -> None:
    """From here on the kernel refuses rank 0 to write any file larger than a megabyte; a checkpoint's is."""
    resource.prlimit(command.rank_pid(0), resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))


def empty_the_disk(command: Running) -> None:
    resource.prlimit(command.rank_pid(0), resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_training_goes_on_while_the_disk_is_full_and_saves_when_it_can_again(folder: Path, undisturbed: Undisturbed) -> None:
    with running(WORDS, folder) as command:
        command.wait_for_checkpoint(SAVE_EVERY)
        fill_the_disk(command)
        command.wait_until(lambda: command.events("checkpoint_failed"), "a checkpoint that fails")
        failed = command.events("checkpoint_failed")[0]["step"]
        assert command.checkpoints()[-1] == failed - SAVE_EVERY
        empty_the_disk(command)
        command.wait_for_checkpoint(failed + SAVE_EVERY)
        assert command.wait() == 0, command.output
        assert f"the checkpoint of step {failed} failed: " in command.output
        assert "training goes on" in command.output
        assert command.events("failure") == []
        assert_nothing_was_lost(command, undisturbed)


def test_after_too_many_failures_it_stops_and_the_good_checkpoint_stays(folder: Path) -> None:
    with running([*WORDS, "checkpoint.max_failures=2"], folder) as command:
        command.wait_for_checkpoint(SAVE_EVERY)
        saved = command.checkpoints()[-1]
        fill_the_disk(command)
        assert command.wait() == 2, command.output
        assert len(command.events("checkpoint_failed")) == 2
        assert "Traceback" not in command.output
        assert "checkpoints" in command.output
        fingerprint = (command.stage / "checkpoints" / f"step-{saved:08d}" / "manifest.json").read_text(encoding="utf-8")
        assert command.stage.name.partition("-")[2] in fingerprint
        assert command.checkpoints()[-1] >= saved


@pytest.mark.parametrize("damage", ["a flipped bit", "truncated", "missing"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(folder: Path, undisturbed: Undisturbed, damage: str) -> None:
    with running(WORDS, folder) as command:
        command.wait_for_checkpoint(2 * SAVE_EVERY)
        command.process.send_signal(signal.SIGTERM)
        command.wait()
        older, newest = command.checkpoints()
        file = command.stage / "checkpoints" / f"step-{newest:08d}" / "tensors.safetensors"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        match damage:
            case "a flipped bit":
                file.write_bytes(content)
            case "truncated":
                file.write_bytes(content[:-1])
            case "missing":
                file.unlink()
    with running(WORDS, folder) as again:
        assert again.wait() == 0, again.output
        assert again.events("resumed")[0]["step"] == older
        (damaged,) = again.events("damaged")
        assert f"step {newest}" in damaged["what"]
        assert damaged["what"] in again.output
        assert_nothing_was_lost(again, undisturbed)
