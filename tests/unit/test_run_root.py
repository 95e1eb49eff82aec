"""What a store holds counts, and only once it is whole: real processes publish, fetch, race and are killed."""

import hashlib
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data.storage import Row, RowWriter
from orchestrator.data.summary import Summary, read_summary, write_summary
from orchestrator.errors import RecipeError, StorageError
from orchestrator.model.tensor_stream import TensorStream
from orchestrator.plan.checkpoints import CHECKPOINTS_NAME, MANIFEST_NAME, checkpoint_folder, checkpoint_steps
from orchestrator.plan.record import RECORD_NAME, Record, commit, read_record
from orchestrator.remote import NotWhole
from orchestrator.run_root import RunRoot, run_root
from tests.unit.object_store import ROOT, SECRET, Bucket, s3_bucket, s3_server

SPAWN = multiprocessing.get_context("spawn")
STAGE = "attention-0123456789ab"
FILES = {"adapter/model.safetensors": os.urandom(3000), "adapter/deep/empty": b"", "word 表.json": "文字".encode()}
RECORD = Record(STAGE, "train", "f" * 64, {}, {}, {}, {}, {})
SUMMARY = Summary("next_token", block_length=8, documents=1, characters=4, rows=1, tokens=4, targets=3, truncated=0)


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        yield environment


@pytest.fixture(params=["folder", "s3"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A place in an object store, where nothing is yet."""
    if request.param == "folder":
        return Bucket(f"folder://{tmp_path}/store/runs/one")
    return s3(request, monkeypatch)


@pytest.fixture
def s3_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    return s3(request, monkeypatch)


@pytest.fixture
def folder_only(tmp_path: Path) -> Bucket:
    """A store whose files are a folder's, so that a test can put a pipe among them."""
    return Bucket(f"folder://{tmp_path}/store/runs/one")


def s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in request.getfixturevalue("s3_environment").items():
        monkeypatch.setenv(name, value)
    return s3_bucket()


def store_folder(bucket: Bucket) -> Path:
    return Path(bucket.url.removeprefix("folder://"))


@pytest.fixture
def here(bucket: Bucket, tmp_path: Path) -> RunRoot:
    return RunRoot(tmp_path / "here", bucket.url)


@pytest.fixture
def there(bucket: Bucket, tmp_path: Path) -> RunRoot:
    """The same run root as another machine has it."""
    return RunRoot(tmp_path / "there", bucket.url)


def write_stage(root: RunRoot, files: dict[str, bytes] = FILES, stage: str = STAGE) -> Record:
    """A finished stage in the mirror, with what lies beside an artifact."""
    folder = root.local / stage
    for name, content in {**files, "metrics.jsonl": b"{}\n", "logs/rank0.log": b"log"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return commit(folder, RECORD)


def write_checkpoint(root: RunRoot, step: int, tensors: bytes = b"tensors") -> str:
    """A committed checkpoint in the mirror; its path below the root."""
    folder = checkpoint_folder(root.local / STAGE, step)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"tensors.safetensors": tensors, "state.json": b"{}"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    listed = {name: {"sha256": sha256(content), "size": len(content)} for name, content in files.items()}
    (folder / MANIFEST_NAME).write_text(json.dumps({"step": step, "files": listed}))
    return folder.relative_to(root.local).as_posix()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def another_process(target: Callable[..., None], *arguments: object) -> Iterator[BaseProcess]:
    process = SPAWN.Process(target=target, args=arguments, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def publish_stage(root: RunRoot) -> None:
    root.publish(STAGE, RECORD_NAME)


def fetch_stage(root: RunRoot, ready: Path | None = None) -> None:
    if ready:
        ready.touch()
    root.fetch(STAGE, RECORD_NAME)


def fetch_records(root: RunRoot, ready: Path) -> None:
    ready.touch()
    root.fetch_records()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_what_one_machine_publishes_another_fetches(here: RunRoot, there: RunRoot) -> None:
    record = write_stage(here)
    here.publish(STAGE, RECORD_NAME)
    assert there.fetch(STAGE, RECORD_NAME) == there.local / STAGE
    written = (here.local / STAGE / RECORD_NAME).read_bytes()
    assert contents(there.local / STAGE) == {**FILES, RECORD_NAME: written}
    assert read_record(there.local / STAGE) == record


def test_prepared_data_travels(here: RunRoot, there: RunRoot) -> None:
    folder = here.local / "data-0123456789ab"
    folder.mkdir(parents=True)
    with RowWriter(folder) as writer:
        writer.append([Row(np.arange(4), np.ones(4, bool))])
    write_summary(folder, SUMMARY, {})
    assert not here.is_committed(folder.name, "data.json")
    here.publish(folder.name, "data.json")
    assert there.is_committed(folder.name, "data.json")
    assert read_summary(there.fetch(folder.name, "data.json")) == SUMMARY
    assert contents(there.local / folder.name) == contents(folder)


def test_a_checkpoint_travels(here: RunRoot, there: RunRoot) -> None:
    # With torch behind it, and imported by name so that the other processes of these tests need not wait for that.
    generations = importlib.import_module("orchestrator.checkpoint.generations")
    generations.Draft(here.local / STAGE, 40, TensorStream.of({})).commit("f" * 64, {"cursor": 7})
    here.publish(f"{STAGE}/{CHECKPOINTS_NAME}/step-00000040", MANIFEST_NAME)
    there.fetch_records()
    assert checkpoint_steps(there.local / STAGE) == [40]
    there.fetch(f"{STAGE}/{CHECKPOINTS_NAME}/step-00000040", MANIFEST_NAME)
    checkpoint, damages = generations.newest_good(there.local / STAGE, "f" * 64)
    assert (checkpoint.step, checkpoint.state, damages) == (40, {"cursor": 7}, [])


def test_records_and_checkpoints_show_without_their_files(here: RunRoot, there: RunRoot) -> None:
    write_stage(here)
    here.publish(STAGE, RECORD_NAME)
    for step in (40, 80):
        here.publish(write_checkpoint(here, step), MANIFEST_NAME)
    there.fetch_records()
    assert read_record(there.local / STAGE) == read_record(here.local / STAGE)
    assert checkpoint_steps(there.local / STAGE) == [40, 80]
    assert {Path(name).name for name in contents(there.local / STAGE)} == {RECORD_NAME, MANIFEST_NAME}


def test_what_the_store_has_not_disappears(here: RunRoot, bucket: Bucket) -> None:
    write_stage(here)
    here.publish(STAGE, RECORD_NAME)
    removed, unpublished = write_checkpoint(here, 40), write_checkpoint(here, 80)
    here.publish(removed, MANIFEST_NAME)
    replaced = here.local / STAGE / CHECKPOINTS_NAME / ".step-00000120.replaced"
    (here.local / write_checkpoint(here, 120)).rename(replaced)
    bucket.delete(f"{STAGE}/{RECORD_NAME}")
    here.remove(removed, MANIFEST_NAME)
    here.fetch_records()
    assert read_record(here.local / STAGE) is None
    assert checkpoint_steps(here.local / STAGE) == []
    assert contents(here.local / unpublished).keys() == {"tensors.safetensors", "state.json"}


def test_a_record_that_was_replaced_in_the_store_is_replaced_here(here: RunRoot, there: RunRoot) -> None:
    write_stage(here)
    here.publish(STAGE, RECORD_NAME)
    fetch_stage(there)
    record = write_stage(here, FILES | {"adapter/model.safetensors": os.urandom(3000)})
    here.publish(STAGE, RECORD_NAME)
    there.fetch_records()
    assert read_record(there.local / STAGE) == record
    fetch_stage(there)
    assert {name: sha256((there.local / STAGE / name).read_bytes()) for name in record.files} == record.files


def test_what_another_process_publishes_is_seen(here: RunRoot, there: RunRoot) -> None:
    write_stage(here, stage="earlier")
    here.publish("earlier", RECORD_NAME)
    there.fetch_records()
    assert [path.parent.name for path in there.local.glob("*/record.json")] == ["earlier"]
    write_stage(here)
    with another_process(publish_stage, here) as process:
        process.join()
        assert process.exitcode == 0
    there.fetch_records()
    assert read_record(there.local / STAGE) == read_record(here.local / STAGE)


@pytest.mark.parametrize("before", ["nothing", "another result"])
def test_a_publish_that_is_killed_before_the_commit_leaves_nothing_that_counts(
    here: RunRoot, there: RunRoot, bucket: Bucket, before: str
) -> None:
    if before == "another result":
        write_stage(here, {"a": b"old", "b": b"old"})
        here.publish(STAGE, RECORD_NAME)
    write_stage(here, {"a": b"new", "b": b"new"})
    # Opening a pipe that nobody writes to keeps the publisher between its first file and its last.
    (here.local / STAGE / "b").unlink()
    os.mkfifo(here.local / STAGE / "b")
    with another_process(publish_stage, here) as process:
        wait_for(lambda: f"{STAGE}/a" in bucket.names() and bucket.read(f"{STAGE}/a") == b"new")
        process.kill()
        process.join()
    assert not there.is_committed(STAGE, RECORD_NAME)
    there.fetch_records()
    assert contents(there.local) == {}
    with pytest.raises(StorageError, match=f"{STAGE}/record.json: is not there"):
        fetch_stage(there)


def test_a_published_folder_is_not_uploaded_again(here: RunRoot, bucket: Bucket) -> None:
    write_stage(here)
    here.publish(STAGE, RECORD_NAME)
    bucket.write(f"{STAGE}/adapter/model.safetensors", b"mark")
    here.publish(STAGE, RECORD_NAME)
    assert bucket.read(f"{STAGE}/adapter/model.safetensors") == b"mark"


def test_only_the_artifact_and_what_is_named_are_published(here: RunRoot, bucket: Bucket) -> None:
    write_stage(here)
    here.publish(STAGE, RECORD_NAME)
    assert bucket.names() == {f"{STAGE}/{name}" for name in (*FILES, RECORD_NAME)}
    here.publish_file(f"{STAGE}/metrics.jsonl")
    assert bucket.read(f"{STAGE}/metrics.jsonl") == b"{}\n"


def test_a_growing_file_is_brought_unless_what_is_here_is_that_and_more(here: RunRoot, there: RunRoot) -> None:
    write_stage(here)
    metrics, path = f"{STAGE}/metrics.jsonl", there.local / STAGE / "metrics.jsonl"
    here.publish_file(metrics)
    there.fetch_file(metrics)
    assert path.read_bytes() == b"{}\n"
    path.write_bytes(b"{}\n{}\n")
    there.fetch_file(metrics)
    assert path.read_bytes() == b"{}\n{}\n"
    path.write_bytes(b"other\n")
    there.fetch_file(metrics)
    assert path.read_bytes() == b"{}\n"
    here.delete(metrics)
    there.fetch_file(metrics)
    there.fetch_file(metrics)
    assert not path.exists()


def test_folders_inside_one_are_removed_if_they_are_there(here: RunRoot, bucket: Bucket) -> None:
    write_stage(here)
    here.publish(STAGE, RECORD_NAME)
    here.publish(write_checkpoint(here, 40), MANIFEST_NAME)
    bucket.write(f"{STAGE}/{CHECKPOINTS_NAME}/step-00000080/half", b"")
    for _ in range(2):
        here.remove_inside(STAGE, (CHECKPOINTS_NAME, "work"))
        assert bucket.names() == {f"{STAGE}/{name}" for name in (*FILES, RECORD_NAME)}
    here.remove_inside("nowhere", (CHECKPOINTS_NAME,))


def test_one_stages_records_can_be_fetched_alone(here: RunRoot, there: RunRoot, bucket: Bucket) -> None:
    for stage in (STAGE, "earlier"):
        write_stage(here, stage=stage)
        here.publish(stage, RECORD_NAME)
    here.publish(write_checkpoint(here, 40), MANIFEST_NAME)
    there.fetch_records(STAGE)
    assert [path.parent.name for path in there.local.glob("*/record.json")] == [STAGE]
    assert checkpoint_steps(there.local / STAGE) == [40]
    bucket.delete(f"{STAGE}/{RECORD_NAME}")
    bucket.delete(f"earlier/{RECORD_NAME}")
    here.fetch_records(STAGE)
    assert [path.parent.name for path in here.local.glob("*/record.json")] == ["earlier"]


def test_what_is_not_whole_is_told_from_a_store_that_does_not_answer(
    here: RunRoot, there: RunRoot, bucket: Bucket, tmp_path: Path
) -> None:
    write_stage(here)
    here.publish(STAGE, RECORD_NAME)
    bucket.delete(f"{STAGE}/adapter/model.safetensors")
    with pytest.raises(NotWhole):
        fetch_stage(there)
    bucket.write(f"{STAGE}/{RECORD_NAME}", b"{}")
    with pytest.raises(NotWhole, match="does not list files"):
        fetch_stage(there)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        RunRoot(tmp_path / "there", f"folder://{tmp_path}/file").fetch(STAGE, RECORD_NAME)
    assert type(caught.value) is StorageError


def test_places_are_shown_as_they_count(tmp_path: Path) -> None:
    assert RunRoot(tmp_path).where(STAGE) == str(tmp_path / STAGE)
    root = RunRoot(tmp_path, "s3://bucket/runs")
    assert (root.where(), root.where(STAGE)) == ("s3://bucket/runs", f"s3://bucket/runs/{STAGE}")
    assert root.inside(tmp_path / STAGE / "adapter") == f"{STAGE}/adapter"


def test_a_file_to_publish_that_is_missing_is_named(here: RunRoot, bucket: Bucket) -> None:
    write_stage(here)
    (here.local / STAGE / "word 表.json").unlink()
    with pytest.raises(StorageError, match=r"word 表.json: cannot be written .*No such file"):
        here.publish(STAGE, RECORD_NAME)
    assert f"{STAGE}/{RECORD_NAME}" not in bucket.names()
    with pytest.raises(StorageError, match=rf"{STAGE}/ledger.jsonl: cannot be read .*No such file"):
        here.publish_file(f"{STAGE}/ledger.jsonl")


def test_a_file_that_is_not_the_one_committed_is_named(here: RunRoot, there: RunRoot, bucket: Bucket) -> None:
    write_stage(here)
    here.publish(STAGE, RECORD_NAME)
    bucket.write(f"{STAGE}/adapter/model.safetensors", bytes(3000))
    with pytest.raises(StorageError) as caught:
        fetch_stage(there)
    assert str(caught.value).startswith(
        f"{bucket.url}/{STAGE}/adapter/model.safetensors: is not the file that {STAGE}/record"
    )
    assert f"remove {bucket.url}/{STAGE}/{RECORD_NAME} to have it made again" in str(caught.value)
    assert not any(FILES.keys() & contents(there.local / STAGE).keys() & {"adapter/model.safetensors", RECORD_NAME})


def test_a_fetch_that_fails_leaves_no_old_commit_over_new_files(here: RunRoot, there: RunRoot, bucket: Bucket) -> None:
    write_stage(here, {"a": b"old", "b": b"old"})
    here.publish(STAGE, RECORD_NAME)
    fetch_stage(there)
    write_stage(here, {"a": b"new", "b": b"new"})
    here.publish(STAGE, RECORD_NAME)
    bucket.delete(f"{STAGE}/b")
    with pytest.raises(StorageError, match=f"{STAGE}/b: cannot be fetched"):
        fetch_stage(there)
    assert contents(there.local / STAGE) == {"a": b"new", "b": b"old"}


def test_a_file_that_is_missing_in_the_store_is_named(here: RunRoot, there: RunRoot, bucket: Bucket) -> None:
    write_stage(here)
    here.publish(STAGE, RECORD_NAME)
    bucket.delete(f"{STAGE}/adapter/model.safetensors")
    with pytest.raises(StorageError, match=f"{bucket.url}/{STAGE}/adapter/model.safetensors: cannot be fetched"):
        fetch_stage(there)
    assert not (there.local / STAGE / RECORD_NAME).exists()


def test_what_is_damaged_or_missing_here_is_fetched_again_and_nothing_else(
    here: RunRoot, there: RunRoot, bucket: Bucket
) -> None:
    write_stage(here)
    here.publish(STAGE, RECORD_NAME)
    fetch_stage(there)
    (there.local / STAGE / "adapter/model.safetensors").write_bytes(b"damaged")
    (there.local / STAGE / "adapter/deep/empty").unlink()
    bucket.delete(f"{STAGE}/word 表.json")
    fetch_stage(there)
    assert {name: (there.local / STAGE / name).read_bytes() for name in FILES} == FILES


def test_a_fetch_that_is_killed_leaves_no_part_of_a_file(folder_only: Bucket, tmp_path: Path) -> None:
    here, there = (RunRoot(tmp_path / name, folder_only.url) for name in ("here", "there"))
    write_stage(here)
    here.publish(STAGE, RECORD_NAME)
    model = store_folder(folder_only) / STAGE / "adapter/model.safetensors"
    model.unlink()
    os.mkfifo(model)
    with another_process(fetch_stage, there) as process, model.open("wb", buffering=0) as pipe:
        pipe.write(FILES["adapter/model.safetensors"][:1000])
        wait_for(lambda: [path.stat().st_size for path in (there.local / ".fetching").rglob("partial")] == [1000])
        process.kill()
        process.join()
    assert not any(path.name == model.name for path in there.local.rglob("*"))
    assert not (there.local / STAGE / RECORD_NAME).exists()
    model.unlink()
    folder_only.write(f"{STAGE}/adapter/model.safetensors", FILES["adapter/model.safetensors"])
    fetch_stage(there)
    assert {name: (there.local / STAGE / name).read_bytes() for name in FILES} == FILES


def test_of_two_processes_that_fetch_at_once_one_does(folder_only: Bucket, tmp_path: Path) -> None:
    here, there = (RunRoot(tmp_path / name, folder_only.url) for name in ("here", "there"))
    write_stage(here)
    here.publish(STAGE, RECORD_NAME)
    model = store_folder(folder_only) / STAGE / "adapter/model.safetensors"
    model.unlink()
    # Gives its content once, and to whoever reads then.
    os.mkfifo(model)
    ready = [tmp_path / "first", tmp_path / "second"]
    with another_process(fetch_stage, there, ready[0]) as first, another_process(fetch_stage, there, ready[1]) as second:
        with model.open("wb") as pipe:
            wait_for(lambda: all(path.exists() for path in ready))
            second.join(0.3)
            pipe.write(FILES["adapter/model.safetensors"])
        first.join()
        second.join()
        assert (first.exitcode, second.exitcode) == (0, 0)
    assert {name: (there.local / STAGE / name).read_bytes() for name in FILES} == FILES


def test_several_processes_fetch_at_once(here: RunRoot, there: RunRoot) -> None:
    write_stage(here)
    here.publish(STAGE, RECORD_NAME)
    with another_process(fetch_stage, there) as first, another_process(fetch_stage, there) as second:
        first.join()
        second.join()
        assert (first.exitcode, second.exitcode) == (0, 0)
    assert {name: (there.local / STAGE / name).read_bytes() for name in FILES} == FILES


def test_a_commit_that_is_being_published_stays(here: RunRoot, tmp_path: Path) -> None:
    with here.committing(STAGE):
        record = write_stage(here)
        with another_process(fetch_records, here, tmp_path / "ready") as process:
            wait_for((tmp_path / "ready").exists)
            process.join(0.5)
            assert process.is_alive()
            here.publish(STAGE, RECORD_NAME)
            assert read_record(here.local / STAGE) == record
    here.fetch_records()
    assert read_record(here.local / STAGE) == record


@pytest.mark.parametrize("name", ["../outside", "/outside", "deep/../../outside", "", "."])
def test_a_name_that_leads_out_of_the_folder_is_refused(there: RunRoot, bucket: Bucket, tmp_path: Path, name: str) -> None:
    bucket.write("outside", b"content")
    bucket.write(f"{STAGE}/{RECORD_NAME}", json.dumps({"files": {name: sha256(b"content")}}).encode())
    with pytest.raises(StorageError, match=f"{STAGE}/record.json: names {name!r}, which leads out of its folder"):
        fetch_stage(there)
    assert not any(path.name == "outside" for path in there.local.rglob("*"))


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"files": 1}', b'{"files": {"a": {"size": 1}}}', b"\xff"])
def test_a_commit_that_lists_no_files_is_refused(there: RunRoot, bucket: Bucket, content: bytes) -> None:
    bucket.write(f"{STAGE}/{RECORD_NAME}", content)
    with pytest.raises(StorageError, match=f"{bucket.url}/{STAGE}/record.json: does not list files with their sha256"):
        fetch_stage(there)


def test_what_is_removed_is_gone_whole(here: RunRoot, bucket: Bucket) -> None:
    for step in (40, 80):
        here.publish(write_checkpoint(here, step), MANIFEST_NAME)
    removed = f"{STAGE}/{CHECKPOINTS_NAME}/step-00000040"
    here.remove(removed, MANIFEST_NAME)
    here.remove(removed, MANIFEST_NAME)
    kept = f"{STAGE}/{CHECKPOINTS_NAME}/step-00000080"
    assert bucket.names() == {f"{kept}/{name}" for name in ("tensors.safetensors", "state.json", MANIFEST_NAME)}


def test_a_removal_that_fails_has_taken_the_commit(
    folder_only: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = RunRoot(tmp_path / "here", folder_only.url)
    checkpoint = write_checkpoint(here, 40)
    here.publish(checkpoint, MANIFEST_NAME)
    monkeypatch.chdir(store_folder(folder_only) / checkpoint)
    with pytest.raises(StorageError, match=f"{checkpoint}: cannot be removed .Cannot delete current working directory"):
        here.remove(checkpoint, MANIFEST_NAME)
    assert {Path(name).name for name in folder_only.names()} == {"tensors.safetensors", "state.json"}


def test_a_small_file_is_written_read_and_deleted(here: RunRoot, there: RunRoot) -> None:
    lease = f"{STAGE}/lease.json"
    assert there.read(lease) is None
    here.write(lease, b"one")
    assert there.read(lease) == b"one"
    here.write(lease, b"two")
    assert there.read(lease) == b"two"
    here.delete(lease)
    here.delete(lease)
    assert there.read(lease) is None


def test_one_of_many_creates_a_file(here: RunRoot) -> None:
    lease = f"{STAGE}/lease.json"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: here.create(lease, str(number).encode()), range(16)))
    assert made.count(True) == 1
    assert here.read(lease) == str(made.index(True)).encode()


def test_a_store_that_cannot_be_read_empties_no_mirror(folder_only: Bucket, tmp_path: Path) -> None:
    here = RunRoot(tmp_path / "here", folder_only.url)
    write_stage(here)
    here.publish(STAGE, RECORD_NAME)
    store_folder(folder_only).parent.rename(tmp_path / "away")
    # Not a folder that is missing, which would be an empty store.
    store_folder(folder_only).parent.write_bytes(b"")
    with pytest.raises(StorageError, match=f"{folder_only.url}/: cannot be listed .*Not a directory"):
        here.fetch_records()
    assert read_record(here.local / STAGE)


def test_a_mirror_that_cannot_be_written_is_named(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"file/mirror/.locks: cannot be made .*Not a directory"):
        RunRoot(tmp_path / "file" / "mirror", bucket.url).fetch(STAGE, RECORD_NAME)


def test_a_bucket_that_is_missing_is_named(s3_only: Bucket, tmp_path: Path) -> None:
    here = RunRoot(tmp_path / "here", "s3://nowhere-to-be-found/runs")
    write_stage(here)
    with pytest.raises(StorageError, match=r"^s3://nowhere-to-be-found/runs/.*: cannot be written .*bucket does not exist"):
        here.publish(STAGE, RECORD_NAME)


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_named(s3_only: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    code = f"from orchestrator.run_root import *; RunRoot(__import__('pathlib').Path({str(tmp_path)!r}), 's3://b/runs').fetch_records()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "StorageError: s3://b/runs/: cannot be listed (Could not connect to the endpoint URL" in result.stderr
    assert SECRET not in result.stderr


def test_no_secret_reaches_mirror_or_store(s3_only: Bucket, tmp_path: Path) -> None:
    here, there = (RunRoot(tmp_path / name, s3_only.url) for name in ("here", "there"))
    write_stage(here)
    here.publish(STAGE, RECORD_NAME)
    there.fetch_records()
    fetch_stage(there)
    with pytest.raises(StorageError) as caught:
        there.fetch(STAGE, "missing.json")
    stored = [s3_only.read(name) for name in s3_only.names()]
    kept = [*contents(tmp_path).values(), *stored, repr(there).encode(), str(caught.value).encode()]
    assert len(kept) > 10
    assert not [content for content in kept if SECRET.encode() in content or b"AKIAIOSFODNN7EXAMPLE" in content]


def test_a_url_gets_a_mirror_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = run_root("folder:///bucket/runs/")
    assert root == run_root("folder:///bucket/runs")
    assert root.url == "folder:///bucket/runs"
    assert root.local.parent == tmp_path / "orchestrator" / "runs"
    assert run_root("folder:///bucket/other").local != root.local
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["runs", "~/runs", "/data/runs", "file:///data/runs"])
def test_a_folder_is_itself(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = Path("/data/runs") if "data" in value else tmp_path / "runs"
    assert run_root(value) == RunRoot(expected, None)


def test_with_a_folder_nothing_is_done(tmp_path: Path) -> None:
    root = run_root(str(tmp_path / "runs"))
    root.fetch_records()
    with root.committing(STAGE):
        root.publish(STAGE, RECORD_NAME)
    root.publish_file("metrics.jsonl")
    root.write("lease.json", b"")
    root.delete("lease.json")
    root.remove(STAGE, RECORD_NAME)
    root.remove_inside(STAGE, ("adapter",))
    root.fetch_file(f"{STAGE}/metrics.jsonl")
    assert root.read("lease.json") is None
    assert root.fetch(STAGE, RECORD_NAME) == tmp_path / "runs" / STAGE
    assert not root.is_committed(STAGE, RECORD_NAME)
    assert list(tmp_path.iterdir()) == []
    write_stage(root)
    before = contents(tmp_path)
    root.fetch_records()
    root.fetch_file(f"{STAGE}/metrics.jsonl")
    root.remove(STAGE, RECORD_NAME)
    root.remove_inside(STAGE, ("adapter",))
    assert root.is_committed(STAGE, RECORD_NAME)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (f"s3://AKIA:{SECRET}@bucket/runs", "run_root: the s3:// URL carries a password"),
        (f"folder://user:{SECRET}@host/runs", "run_root: the folder:// URL carries a password"),
        (f"s3://bucket/runs?key=AKIA&secret={SECRET}", "run_root: the s3:// URL goes on after a question mark"),
        (f"gs://bucket/runs?token={SECRET}", "run_root: the gs:// URL goes on after a question mark"),
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(value: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        run_root(value)
    assert "environment" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "AKIA" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("s4://bucket/runs", "run_root: nothing opens s4://; give a folder, s3://bucket/folder, gs://"),
        ("simplecache::s3://bucket/runs", "run_root: nothing opens simplecache::s3://"),
        ("folder:///runs::memory://x", "run_root: folder:///runs::memory://x is a pattern or a chain"),
        ("folder:///runs/*", r"run_root: folder:///runs/\* is a pattern"),
        ("s3://", "run_root: s3:// names no place; write s3://bucket/folder"),
        ("file://runs", "run_root: file://runs is no absolute path; write file:///folder"),
    ],
)
def test_a_url_that_cannot_be_a_run_root_is_refused(value: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run_root(value)


@pytest.mark.parametrize(
    ("protocol", "package", "message"),
    [
        ("s3", "s3fs", "s3:// needs s3fs ({reason}); in the project's folder, pip install -e '.[s3]'"),
        ("gs", "gcsfs", "gs:// needs gcsfs ({reason}); in the project's folder, pip install -e '.[gcs]'"),
        ("abfs", "adlfs", "abfs:// cannot be opened here (Install adlfs to access"),
    ],
)
def test_a_missing_package_is_named(protocol: str, package: str, message: str) -> None:
    # Without the package, whether or not it is installed here.
    code = (
        f"import sys; sys.modules[{package!r}] = None\nfrom orchestrator.run_root import *\nrun_root('{protocol}://b/runs')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    reason = f"import of {package} halted; None in sys.modules"
    assert f"RecipeError: run_root: {message.format(reason=reason)}" in result.stderr
