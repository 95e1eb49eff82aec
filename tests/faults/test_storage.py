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


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {flip_a_bit: "sha256 differs", truncate: "is truncated", Path.unlink: "is missing"}


def test_damaged_checkpoints_are_passed_over_for_those_before(folder: Path, undisturbed: Undisturbed) -> None:
    """Three times in one run: stopped, its newest checkpoint damaged in another way, and started again."""
    expected = []
    for damage in DAMAGES:
        with running(WORDS, folder) as command:
            before = len(command.events("checkpoint"))
            command.wait_until(lambda: len(command.events("checkpoint")) > before + (not expected), "checkpoints")  # noqa: B023
            command.process.send_signal(signal.SIGTERM)
            command.wait()
            older, newest = command.checkpoints()
            damage(command.stage / "checkpoints" / f"step-{newest:08d}" / "tensors.safetensors")
            expected.append((older, newest))
    with running(WORDS, folder) as again:
        assert again.wait() == 0, again.output
        assert [event["step"] for event in again.events("resumed")] == [older for older, _ in expected]
        damaged = [event["what"] for event in again.events("damaged")]
        for (_, newest), what, said in zip(expected, DAMAGES.values(), damaged, strict=True):
            assert f"step {newest}" in said
            assert what in said
            assert said in again.output
        assert_nothing_was_lost(again, undisturbed)
