"""Wherever a process is killed, what was committed is there and whole, and nothing else looks like it."""

import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from orchestrator.checkpoint.generations import newest_good, prune
from orchestrator.plan.checkpoints import (
    CHECKPOINTS_NAME,
    checkpoint_folder,
    checkpoint_steps,
    replaced_folder,
    step_folders,
)
from tests.unit.checkpoint.dying import (
    FINGERPRINT,
    contents,
    received,
    start,
    version_of,
    write_generation,
    write_until,
    write_without_end,
)

KILLS = 30
MEMORY = Path("/dev/shm")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be had: a kill loses nothing that was written, and a disk takes its time to flush it."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else tmp_path) as folder:
        yield Path(folder)


def check_all_are_whole(stage_folder: Path) -> None:
    """Every committed generation, from the newest on; deletes them for that."""
    for step in reversed(step_folders(stage_folder)):
        checkpoint, damages = newest_good(stage_folder, FINGERPRINT)
        assert checkpoint is not None
        assert (checkpoint.step, damages) == (step, [])
        for folder in (checkpoint_folder(stage_folder, step), replaced_folder(stage_folder, step)):
            shutil.rmtree(folder, ignore_errors=True)


def check_nothing_else_is_there(stage_folder: Path) -> None:
    names = {path.name for path in (stage_folder / CHECKPOINTS_NAME).iterdir()}
    assert names == {f"step-{step:08d}" for step in checkpoint_steps(stage_folder)}


def interrupt(stage_folder: Path) -> None:
    """As a process leaves it that dies while step 40 is replaced, after another died while a step 40 was deleted."""
    shutil.copytree(checkpoint_folder(stage_folder, 40), stage_folder / CHECKPOINTS_NAME / ".step-00000040.partial")
    checkpoint_folder(stage_folder, 40).rename(replaced_folder(stage_folder, 40))
    half = stage_folder / CHECKPOINTS_NAME / ".step-00000040.removed"
    shutil.copytree(checkpoint_folder(stage_folder, 20), half)
    (half / "state.json").unlink()


@pytest.mark.parametrize("is_interrupted", [False, True])
@pytest.mark.parametrize(("step", "keep"), [(40, 1), (40, 2), (60, 2)])
def test_a_death_before_any_change_to_a_file_loses_nothing(folder: Path, step: int, keep: int, is_interrupted: bool) -> None:
    for before in (20, 40):
        write_generation(folder / "before", FINGERPRINT, before, *contents(version=1))
    if is_interrupted:
        interrupt(folder / "before")
    versions = []
    for num_changes in count():
        stage_folder = folder / str(num_changes)
        shutil.copytree(folder / "before", stage_folder)
        process, receiver = start(write_until, stage_folder, step, keep, num_changes)
        sent = received(receiver)
        process.join()
        checkpoint, damages = newest_good(stage_folder, FINGERPRINT)
        versions.append(version_of(checkpoint))
        assert damages == []
        assert checkpoint is not None
        assert checkpoint.step == (step if versions[-1] == 2 else 40)
        assert versions[-1] == 2 or not sent
        check_all_are_whole(shutil.copytree(stage_folder, folder / "copy"))
        shutil.rmtree(folder / "copy")
        prune(stage_folder, keep)
        check_nothing_else_is_there(stage_folder)
        assert len(checkpoint_steps(stage_folder)) == keep
        assert version_of(newest_good(stage_folder, FINGERPRINT)[0]) == versions[-1]
        check_all_are_whole(stage_folder)
        if process.exitcode == 0:
            assert sent == ["committed", "pruned"]
            break
        assert process.exitcode == -signal.SIGKILL
    # Some died before the commit, some between it and the end; and never back and forth.
    assert versions == sorted(versions)
    assert min(versions.count(1), versions.count(2)) > 5


def test_a_death_at_any_moment_loses_nothing(folder: Path) -> None:
    moments = random.Random(0)
    checkpoints = folder / CHECKPOINTS_NAME
    version, deaths_in_a_write, commits = 2, 0, 0
    for number in range(KILLS):
        process, receiver = start(write_without_end, folder, version)
        # Some die while they start, some after a commit, and most once a write has been seen to begin.
        if number % 6:
            assert receiver.poll(60)
            while number % 3 and not any(checkpoints.glob(".step-*")):
                assert process.is_alive()
        time.sleep(moments.uniform(0, 0.004) if number % 3 else moments.uniform(0, 0.04))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        reported = received(receiver)
        commits += len(reported)
        deaths_in_a_write += any(checkpoints.glob(".step-*"))
        checkpoint, damages = newest_good(folder, FINGERPRINT)
        assert damages == []
        if checkpoint:
            assert version_of(checkpoint) >= max(reported, default=version - 1)
            assert checkpoint.step == version_of(checkpoint) // 2
            version = version_of(checkpoint) + 1
        assert checkpoint or version == 2
        if number % 5 == 4:
            prune(folder, keep=2)
            check_nothing_else_is_there(folder)
    # Otherwise the moments were none that count.
    assert deaths_in_a_write > KILLS / 10
    assert commits > KILLS / 2
    check_all_are_whole(folder)
