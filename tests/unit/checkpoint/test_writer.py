"""Checkpoints are written beside the training, which goes on whatever the disk does, up to a point."""

import shutil
import threading
from collections import UserDict
from collections.abc import KeysView
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.generations import newest_good
from orchestrator.checkpoint.writer import CheckpointWriter
from orchestrator.errors import StorageError
from orchestrator.model.tensor_stream import TensorStream
from orchestrator.plan.checkpoints import CHECKPOINTS_NAME, checkpoint_folder, checkpoint_steps
from tests.unit.checkpoint.dying import (
    FINGERPRINT,
    contents,
    received,
    save_on_a_disk_that_fills_up,
    start,
    streamed,
    version_of,
    write_generation,
)


class Held(UserDict[str, Any]):
    """A state that nobody can read before it is released: its write takes as long as a test wants."""

    def __init__(self) -> None:
        super().__init__({"version": 0})
        self.is_read, self.is_released = threading.Event(), threading.Event()

    def keys(self) -> KeysView[str]:
        self.is_read.set()
        assert self.is_released.wait(timeout=60), "nobody released it"
        return super().keys()


@pytest.fixture
def events() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def writer(tmp_path: Path, events: list[dict[str, Any]]) -> CheckpointWriter:
    return CheckpointWriter(tmp_path, FINGERPRINT, keep=2, max_failures=2, report=lambda event: events.append(dict(event)))


def block(stage_folder: Path) -> Path:
    """A file where the folder of the checkpoints should be."""
    path = stage_folder / CHECKPOINTS_NAME
    path.write_text("in the way")
    return path


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, writer: CheckpointWriter, events: list[dict[str, Any]]
) -> None:
    state = Held()
    writer.save(20, streamed(20)[0], state)
    assert state.is_read.wait(timeout=60)
    assert checkpoint_steps(tmp_path) == []
    writer.save(40, *streamed(40))
    assert events == [{"event": "checkpoint_skipped", "step": 40, "reason": "the one before is still being written"}]
    state.is_released.set()
    writer.finish()
    assert checkpoint_steps(tmp_path) == [20]
    assert [(event["event"], event["step"]) for event in events[1:]] == [("checkpoint", 20)]


def test_a_run_that_stops_waits_for_the_one_before_and_its_own(
    tmp_path: Path, writer: CheckpointWriter, events: list[dict[str, Any]]
) -> None:
    state = Held()
    writer.save(20, streamed(20)[0], state)
    threading.Timer(0.05, state.is_released.set).start()
    writer.save(40, *streamed(40), wait=True)
    assert checkpoint_steps(tmp_path) == [20, 40]
    assert [(event["event"], event["step"]) for event in events] == [("checkpoint", 20), ("checkpoint", 40)]
    writer.finish()


def test_each_commit_is_reported_and_leaves_so_many(
    tmp_path: Path, writer: CheckpointWriter, events: list[dict[str, Any]]
) -> None:
    with writer:
        for step in (1, 2, 3, 4):
            writer.save(step, *streamed(step), wait=True)
            assert checkpoint_steps(tmp_path) == [step - 1, step][-step:]
    sizes = [event.pop("bytes") for event in events]
    assert all(event.pop("seconds") > 0 for event in events)
    assert events == [{"event": "checkpoint", "step": step} for step in (1, 2, 3, 4)]
    checkpoint, _ = newest_good(tmp_path, FINGERPRINT)
    assert version_of(checkpoint) == 4
    assert checkpoint is not None
    assert sizes[-1] == checkpoint.bytes


def test_one_further_on_does_not_take_the_place_of_the_one_just_written(tmp_path: Path, writer: CheckpointWriter) -> None:
    for step in (10, 20, 40, 60):
        write_generation(tmp_path, FINGERPRINT, step, *contents(step))
    with writer:
        writer.save(30, *streamed(30))
    assert checkpoint_steps(tmp_path) == [20, 30]


def test_a_full_disk_does_not_stop_training_until_it_was_full_too_often(tmp_path: Path) -> None:
    process, receiver = start(save_on_a_disk_that_fills_up, tmp_path)
    *events, error = received(receiver)
    process.join()
    saved, failed = "checkpoint", "checkpoint_failed"
    assert [(event["step"], event["event"]) for event in events] == [
        (20, saved),
        (40, failed),
        (50, saved),
        (60, failed),
        (70, failed),
        (80, saved),
        (100, failed),
        (120, failed),
        (140, failed),
    ]
    assert all("File too large" in event["error"] for event in events if event["event"] == failed)
    assert error.startswith(f"{tmp_path / CHECKPOINTS_NAME}: 3 checkpoints in a row could not be written (step 140: ")
    assert "File too large" in error
    assert "make room there" in error
    assert {path.name for path in (tmp_path / CHECKPOINTS_NAME).iterdir()} == {f"step-{step:08d}" for step in (20, 50, 80)}
    assert version_of(newest_good(tmp_path, FINGERPRINT)[0]) == 80


def test_where_the_disk_takes_nothing_the_tensors_are_read_all_the_same(tmp_path: Path, writer: CheckpointWriter) -> None:
    read: list[int] = []

    def stream(step: int) -> TensorStream:
        tensors = TensorStream.of(contents(step)[0])
        return replace(tensors, parts=(part for part in tensors.parts if not read.append(step)))

    state = Held()
    writer.save(10, stream(10), state)
    writer.save(20, stream(20), {})
    state.is_released.set()
    writer.save(30, stream(30), {}, wait=True)
    shutil.rmtree(tmp_path / CHECKPOINTS_NAME)
    block(tmp_path)
    writer.save(40, stream(40), {}, wait=True)
    writer.save(50, stream(50), {})
    with pytest.raises(StorageError):
        writer.save(60, stream(60), {}, wait=True)
    assert read == [step for step in (10, 20, 30, 40, 50, 60) for _ in range(3)]


def test_too_many_failures_are_raised_by_what_comes_next(
    tmp_path: Path, writer: CheckpointWriter, events: list[dict[str, Any]]
) -> None:
    block(tmp_path)
    writer.save(20, *streamed(20), wait=True)
    writer.save(40, *streamed(40))
    with pytest.raises(StorageError, match=r"2 checkpoints in a row could not be written \(step 40: .*File exists"):
        writer.save(60, *streamed(60), wait=True)
    with pytest.raises(StorageError, match="2 checkpoints in a row"):
        writer.finish()
    assert [(event["event"], event["step"]) for event in events] == [("checkpoint_failed", 20), ("checkpoint_failed", 40)]
    assert all("File exists" in event["error"] for event in events)


def test_a_mistake_of_ours_does_not_vanish_in_the_background(tmp_path: Path, writer: CheckpointWriter) -> None:
    writer.save(20, TensorStream.of({}), {"a": object()})
    with pytest.raises(TypeError, match="JSON"):
        writer.save(40, *streamed(40), wait=True)
    writer.save(40, *streamed(40))
    writer.finish()
    assert [path.name for path in (tmp_path / CHECKPOINTS_NAME).iterdir()] == ["step-00000040"]


def test_a_mistake_in_the_last_write_is_raised_at_the_end(writer: CheckpointWriter) -> None:
    writer.save(20, TensorStream.of({}), {"a": object()})
    with pytest.raises(TypeError, match="JSON"):
        writer.finish()


def test_what_ends_the_training_is_what_is_raised(tmp_path: Path, writer: CheckpointWriter) -> None:
    block(tmp_path)
    writer.save(20, *streamed(20), wait=True)
    writer.save(40, *streamed(40))
    with pytest.raises(KeyError, match="training") as raised, writer:
        raise KeyError("training")
    assert "2 checkpoints in a row" in raised.value.__notes__[0]


def test_leaving_waits_for_the_write(tmp_path: Path, writer: CheckpointWriter) -> None:
    state = Held()
    with writer:
        writer.save(20, streamed(20)[0], state)
        threading.Timer(0.05, state.is_released.set).start()
    assert checkpoint_steps(tmp_path) == [20]


def test_one_that_cannot_be_deleted_is_told_and_does_not_count_as_a_failed_write(
    tmp_path: Path, writer: CheckpointWriter, events: list[dict[str, Any]]
) -> None:
    # Its name is as long as a name can be, so the one under which it is deleted is too long.
    checkpoint_folder(tmp_path, int("9" * 250)).mkdir(parents=True)
    with writer:
        for step in (20, 40, 60):
            writer.save(step, *streamed(step), wait=True)
    kinds = [event["event"] for event in events]
    assert kinds == ["checkpoint_cleanup_failed", "checkpoint"] * 3
    assert "name too long" in events[0]["error"]
    assert checkpoint_steps(tmp_path) == [20, 40, 60]
