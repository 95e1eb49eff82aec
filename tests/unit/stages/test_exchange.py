"""What a stage needs comes to the machine that runs it, and what it makes there is committed by another."""

import json
from pathlib import Path

import pytest

from orchestrator.errors import StorageError
from orchestrator.plan.record import Record, commit, read_record
from orchestrator.run_root import RunRoot
from orchestrator.stages.bodies import exchanging_body
from orchestrator.stages.exchange import Exchange
from tests.unit.object_store import Bucket

PARENT, STAGE = "vocabulary-0123456789ab", "export-0123456789ab"


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    return Bucket(f"folder://{tmp_path}/store/runs")


@pytest.fixture
def command(tmp_path: Path, bucket: Bucket) -> Exchange:
    """As the machine of the command has it, where the parent was made."""
    exchange = Exchange.of(RunRoot(tmp_path / "command", bucket.url), STAGE, [PARENT])
    write(exchange.root.local / PARENT, {"base/model": b"weights"})
    commit(exchange.root.local / PARENT, record_of(PARENT))
    exchange.root.publish(PARENT, "record.json")
    exchange.clear()
    return exchange


@pytest.fixture
def worker(tmp_path: Path, bucket: Bucket) -> Exchange:
    return Exchange.of(RunRoot(tmp_path / "worker", bucket.url), STAGE, [PARENT])


def record_of(stage: str) -> Record:
    return Record(stage, "export", "f" * 64, {}, {}, {}, {}, {})


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def make(root: RunRoot, content: str) -> dict[str, object]:
    """A body: reads what it is made from."""
    base = (root.local / PARENT / "base/model").read_bytes()
    write(root.local / STAGE, {"merged/model": base + content.encode(), "work/results.json": b"{}", "metrics.jsonl": b""})
    return {"made": content}


def test_what_is_made_on_another_machine_is_committed_on_the_commands(
    command: Exchange, worker: Exchange, bucket: Bucket
) -> None:
    assert exchanging_body(worker, make, worker.root, "!") == {"made": "!"}
    command.collect()
    folder = command.root.local / STAGE
    assert (folder / "merged/model").read_bytes() == b"weights!"
    assert (folder / "work/results.json").read_bytes() == b"{}"
    record = commit(folder, record_of(STAGE))
    assert record.files.keys() == {"merged/model"}
    bucket.write(f"{STAGE}/merged/model", b"mark")
    command.publish_record()
    assert bucket.read(f"{STAGE}/merged/model") == b"mark", "uploaded twice"
    worker.root.fetch_records()
    assert read_record(worker.root.local / STAGE) == record


def test_a_file_that_changed_after_it_was_handed_over_is_published_with_the_record(
    command: Exchange, worker: Exchange, bucket: Bucket
) -> None:
    exchanging_body(worker, make, worker.root, "!")
    command.collect()
    write(command.root.local / STAGE, {"merged/model": b"other"})
    commit(command.root.local / STAGE, record_of(STAGE))
    command.publish_record()
    assert bucket.read(f"{STAGE}/merged/model") == b"other"


def test_what_an_unfinished_attempt_left_there_is_no_part_of_the_artifact(worker: Exchange, command: Exchange) -> None:
    folder = worker.root.local / STAGE
    kept = {"checkpoints/step-00000005/manifest.json": b"{}", "ledger.jsonl": b"", "logs/rank-0.log": b"log"}
    write(folder, {**kept, "merged/shard-2": b"old", "old.json": b"old", "work/old": b"old"})
    exchanging_body(worker, make, worker.root, "!")
    made = json.loads((folder / "work/made.json").read_bytes())
    assert made["files"].keys() == {"merged/model", "work/results.json"}
    assert all((folder / name).read_bytes() == content for name, content in kept.items())


def test_a_parent_that_is_not_in_the_store_is_named(worker: Exchange) -> None:
    with pytest.raises(StorageError, match=rf"{PARENT}/record\.json: is not there, so {PARENT} was never finished"):
        exchanging_body(worker, make, worker.root, "!")


def test_prepared_data_is_needed_too(command: Exchange, worker: Exchange) -> None:
    local = command.root.local
    write(local / "data-0123456789ab", {"data.json": b'{"arrays": {}}'})
    command.root.publish("data-0123456789ab", "data.json")
    worker.with_data([worker.root.local / "data-0123456789ab"]).bring()
    assert (worker.root.local / "data-0123456789ab" / "data.json").is_file()
    assert (worker.root.local / PARENT / "base" / "model").is_file()


def test_where_the_run_root_is_a_folder_nothing_is_exchanged(tmp_path: Path) -> None:
    exchange = Exchange.of(RunRoot(tmp_path), STAGE, [PARENT])
    write(tmp_path, {f"{PARENT}/base/model": b"weights", f"{STAGE}/merged/old": b"old"})
    exchanging_body(exchange, make, exchange.root, "!")
    exchange.collect()
    exchange.publish_record()
    found = {path.relative_to(tmp_path / STAGE).as_posix() for path in (tmp_path / STAGE).rglob("*") if path.is_file()}
    assert found == {"merged/old", "merged/model", "work/results.json", "metrics.jsonl"}
    assert not (tmp_path / ".locks").exists()
