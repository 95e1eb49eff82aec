"""Checkpoints in an object store: what one machine publishes another goes on from, and a store that fails stops nothing."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.files import Checkpoint
from orchestrator.checkpoint.generations import newest_good, prune
from orchestrator.checkpoint.stored import StoredCheckpoints
from orchestrator.checkpoint.writer import CheckpointWriter
from orchestrator.errors import StorageError
from orchestrator.plan.checkpoints import checkpoint_steps
from orchestrator.run_root import RunRoot
from tests.unit.checkpoint.dying import FINGERPRINT, contents, streamed, version_of, write_generation
from tests.unit.object_store import Bucket

STAGE = "attention-0123456789ab"


class Machine:
    """One machine's mirror of a run root."""

    def __init__(self, local: Path, bucket: Bucket) -> None:
        self.root = RunRoot(local, bucket.url)
        self.folder = local / STAGE
        self.stored = StoredCheckpoints(self.root, self.folder)
        self.events: list[dict[str, Any]] = []
        self.folder.mkdir(parents=True)

    def writer(self, keep: int = 2, max_failures: int = 3) -> CheckpointWriter:
        report = lambda event: self.events.append(dict(event))  # noqa: E731
        return CheckpointWriter(self.folder, FINGERPRINT, keep, max_failures, report, self.root)

    def save(self, *steps: int) -> None:
        with self.writer() as writer:
            for step in steps:
                (self.folder / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(1, step + 1)))
                writer.save(step, *streamed(step), wait=True)

    def newest_good(self) -> tuple[Checkpoint | None, list[str]]:
        self.stored.mirror()
        return newest_good(self.folder, FINGERPRINT, self.stored.fetch)


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    return Bucket(f"folder://{tmp_path}/store/runs")


@pytest.fixture
def here(tmp_path: Path, bucket: Bucket) -> Machine:
    return Machine(tmp_path / "here", bucket)


@pytest.fixture
def there(tmp_path: Path, bucket: Bucket) -> Machine:
    return Machine(tmp_path / "there", bucket)


def store_folder(bucket: Bucket) -> Path:
    return Path(bucket.url.removeprefix("folder://"))


def published_steps(bucket: Bucket) -> list[int]:
    manifests = [name.split("/") for name in bucket.names() if name.endswith("/manifest.json")]
    return sorted(int(step.removeprefix("step-")) for _, _, step, _ in manifests)


def test_each_generation_is_published_and_the_pruned_are_removed(here: Machine, bucket: Bucket) -> None:
    here.save(5, 10, 15)
    assert published_steps(bucket) == checkpoint_steps(here.folder) == [10, 15]
    files = {"manifest.json", "state.json", "tensors.safetensors"}
    expected = {f"{STAGE}/checkpoints/step-{step:08d}/{name}" for step in (10, 15) for name in files}
    assert bucket.names() == {*expected, f"{STAGE}/metrics.jsonl"}
    assert [(event["event"], event["step"]) for event in here.events] == [("checkpoint", step) for step in (5, 10, 15)]


def test_another_machine_goes_on_from_the_newest_with_the_numbers_before_it(here: Machine, there: Machine) -> None:
    here.save(5, 10)
    checkpoint, damages = there.newest_good()
    assert (version_of(checkpoint), damages) == (10, [])
    assert [json.loads(line)["step"] for line in (there.folder / "metrics.jsonl").open()] == list(range(1, 11))
    there.save(15)
    assert version_of(here.newest_good()[0]) == 15


def test_a_generation_never_counts_before_its_metrics_are_there(here: Machine, bucket: Bucket) -> None:
    (store_folder(bucket) / STAGE / "metrics.jsonl").mkdir(parents=True)
    here.save(5)
    (event,) = here.events
    assert event["event"] == "checkpoint_failed"
    assert published_steps(bucket) == []


def test_what_the_store_lost_or_damaged_is_passed_over(here: Machine, there: Machine, bucket: Bucket) -> None:
    here.save(5, 10)
    tensors = f"{STAGE}/checkpoints/step-00000010/tensors.safetensors"
    bucket.write(tensors, b"damaged")
    checkpoint, (damage,) = there.newest_good()
    assert version_of(checkpoint) == 5
    assert damage.startswith(f"step 10: {bucket.url}/{tensors}: is not the file that ")
    bucket.delete(tensors)
    checkpoint, (damage,) = there.newest_good()
    assert version_of(checkpoint) == 5
    assert damage.startswith(f"step 10: {bucket.url}/{tensors}: cannot be fetched")


def test_a_store_that_does_not_answer_is_no_damage(here: Machine, there: Machine, bucket: Bucket) -> None:
    here.save(5)
    there.stored.mirror()
    state = store_folder(bucket) / STAGE / "checkpoints" / "step-00000005" / "state.json"
    state.unlink()
    # A link to itself cannot be opened, as a store that does not answer cannot be asked.
    state.symlink_to(state)
    with pytest.raises(StorageError, match=r"state\.json: cannot be fetched"):
        newest_good(there.folder, FINGERPRINT, there.stored.fetch)


def test_what_was_never_published_does_not_count_and_is_no_damage(here: Machine) -> None:
    here.save(5)
    write_generation(here.folder, FINGERPRINT, 10, *contents(10))
    checkpoint, damages = here.newest_good()
    assert (version_of(checkpoint), damages) == (5, [])
    assert [path.name for path in (here.folder / "checkpoints").iterdir()] == ["step-00000005"]


def test_without_anything_in_the_store_a_stage_starts_anew(here: Machine) -> None:
    write_generation(here.folder, FINGERPRINT, 10, *contents(10))
    (here.folder / "metrics.jsonl").write_text('{"step": 10}\n')
    assert here.newest_good() == (None, [])
    assert not (here.folder / "metrics.jsonl").exists()


def test_one_that_could_not_be_published_stays_and_goes_with_the_next(here: Machine, there: Machine, bucket: Bucket) -> None:
    here.save(5)
    store, away = store_folder(bucket), store_folder(bucket).with_name("away")
    with here.writer() as writer:
        store.rename(away)
        store.write_bytes(b"in the way")
        writer.save(10, *streamed(10), wait=True)
        assert checkpoint_steps(here.folder) == [5, 10]
        store.unlink()
        away.rename(store)
        writer.save(15, *streamed(15), wait=True)
    (failed,) = [event for event in here.events if event["event"] == "checkpoint_failed"]
    assert failed["step"] == 10
    assert failed["error"].startswith(bucket.url)
    assert published_steps(bucket) == [10, 15]
    assert version_of(there.newest_good()[0]) == 15


def test_a_damaged_one_further_on_is_not_published_in_the_place_of_the_one_just_written(
    here: Machine, bucket: Bucket
) -> None:
    write_generation(here.folder, FINGERPRINT, 60, *contents(60))
    with here.writer(keep=1) as writer:
        writer.save(30, *streamed(30))
    assert published_steps(bucket) == checkpoint_steps(here.folder) == [30]


def test_none_is_on_the_disk_alone_while_another_command_of_the_machine_looks(here: Machine, bucket: Bucket) -> None:
    """What is here and not in the store it would remove."""
    with here.writer() as writer, here.root.committing(STAGE):
        writer.save(5, *streamed(5))
        time.sleep(0.3)
        assert checkpoint_steps(here.folder) == []
    assert published_steps(bucket) == checkpoint_steps(here.folder) == [5]


def test_a_store_that_fails_too_often_stops_the_training(here: Machine, bucket: Bucket) -> None:
    store_folder(bucket).parent.write_bytes(b"in the way")
    writer = here.writer(max_failures=2)
    writer.save(5, *streamed(5), wait=True)
    with pytest.raises(StorageError, match=rf"^{bucket.url}/{STAGE}/checkpoints: 2 checkpoints in a row could not be"):
        writer.save(10, *streamed(10), wait=True)
    assert checkpoint_steps(here.folder) == [5, 10]


def test_what_cannot_be_removed_there_is_told_and_counts_as_written(
    here: Machine, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.save(5, 10)
    # A folder store refuses to delete the folder that it is in.
    monkeypatch.chdir(store_folder(bucket) / STAGE / "checkpoints" / "step-00000005")
    here.save(15)
    assert [event["event"] for event in here.events[2:]] == ["checkpoint_cleanup_failed", "checkpoint"]
    assert published_steps(bucket) == [10, 15]


def test_where_the_run_root_is_a_folder_nothing_is_published(tmp_path: Path) -> None:
    folder = tmp_path / STAGE
    stored = StoredCheckpoints(RunRoot(tmp_path), folder)
    for step in (5, 10):
        write_generation(folder, FINGERPRINT, step, *contents(step))
        stored.publish(step, keep=1)
    (folder / "metrics.jsonl").write_text('{"step": 10}\n')
    stored.mirror()
    stored.fetch(10)
    assert checkpoint_steps(folder) == [5, 10]
    assert (folder / "metrics.jsonl").exists()
    with stored.removing():
        prune(folder, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {STAGE}
