"""A stage's ledger in the object store while the stage runs, and what a person sees of ranks on other machines."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator import publishing
from orchestrator.lease import InFolder, InStore, Lease, held
from orchestrator.publishing import Numbers, open_ledger
from orchestrator.run_root import RunRoot
from orchestrator.tracking.ledger import Ledger
from tests.unit.object_store import Bucket

STAGE = "attention-0123456789ab"
LEDGER, METRICS = f"{STAGE}/ledger.jsonl", f"{STAGE}/metrics.jsonl"


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    return Bucket(f"folder://{tmp_path}/store/runs")


@pytest.fixture
def root(tmp_path: Path, bucket: Bucket) -> RunRoot:
    return RunRoot(tmp_path / "mirror", bucket.url)


@pytest.fixture
def lease(root: RunRoot) -> Iterator[Lease]:
    with held(InStore(root, STAGE), "python run.py") as lease:
        yield lease


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_PUBLISH_SECONDS", 0.05)
    monkeypatch.setattr(publishing, "_LOOK_SECONDS", 0.0)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def events(bucket: Bucket) -> list[str]:
    content = bucket.read(LEDGER) if LEDGER in bucket.names() else b""
    return [json.loads(line)["event"] for line in content.splitlines()]


def test_the_first_event_is_published_at_once_and_the_others_together(root: RunRoot, lease: Lease, bucket: Bucket) -> None:
    with open_ledger(root, root.local / STAGE, lease, print) as ledger:
        ledger.write("begin")
        wait_until(lambda: events(bucket) == ["begin"])
        ledger.write("attempt")
        ledger.write("finish")
        assert events(bucket) == ["begin"], "the next upload comes seconds later"
    assert events(bucket) == ["begin", "attempt", "finish"]


@pytest.mark.usefixtures("quick")
def test_later_events_are_published_while_the_stage_runs(root: RunRoot, lease: Lease, bucket: Bucket) -> None:
    with open_ledger(root, root.local / STAGE, lease, print) as ledger:
        for count in range(1, 4):
            ledger.write("attempt")
            wait_until(lambda count=count: len(events(bucket)) == count)


@pytest.mark.usefixtures("quick")
def test_a_store_that_fails_is_told_once_and_tried_again(
    root: RunRoot, lease: Lease, bucket: Bucket, tmp_path: Path
) -> None:
    said: list[str] = []
    in_the_way = tmp_path / "store" / "runs" / LEDGER
    in_the_way.mkdir(parents=True)
    with open_ledger(root, root.local / STAGE, lease, said.append) as ledger:
        ledger.write("begin")
        wait_until(lambda: said)
        ledger.write("attempt")
        time.sleep(0.2)
        in_the_way.rmdir()
        ledger.write("finish")
        wait_until(lambda: len(events(bucket)) == 3)
    (line,) = said
    assert line.startswith(f"  {bucket.url}/{LEDGER}: cannot be written (")
    assert line.endswith("the stage goes on, and the next event tries again")


def test_a_run_that_lost_its_lease_publishes_no_more(root: RunRoot, bucket: Bucket) -> None:
    with held(InStore(root, STAGE), "a", renew_seconds=0.01) as lease:
        wait_until(lambda: bucket.write(f"{STAGE}/lease.json", b"{}") or lease.is_lost)
        with open_ledger(root, root.local / STAGE, lease, print) as ledger:
            ledger.write("begin")
    assert LEDGER not in bucket.names()


def test_where_the_run_root_is_a_folder_the_ledger_is_a_file_and_no_more(tmp_path: Path) -> None:
    with held(InFolder(tmp_path / STAGE), "a") as lease:
        ledger = open_ledger(RunRoot(tmp_path), tmp_path / STAGE, lease, print)
        assert type(ledger) is Ledger
        ledger.close()


def row(step: int, seconds: float) -> bytes:
    return json.dumps({"step": step, "time": seconds}).encode() + b"\n"


@pytest.mark.usefixtures("quick")
def test_numbers_come_from_wherever_rank_0_is(root: RunRoot, bucket: Bucket) -> None:
    numbers = Numbers(root, root.local / STAGE)
    assert numbers.rows() == []
    now = time.time()
    bucket.write(METRICS, row(1, now - 10))
    assert [seen["step"] for seen in numbers.rows()] == [1]
    (root.local / METRICS).write_bytes(row(1, now - 10) + row(2, now - 5))
    assert [seen["step"] for seen in numbers.rows()] == [1, 2]
    bucket.write(METRICS, row(1, now - 10) + row(2, now - 5) + row(3, now - 1))
    assert [seen["step"] for seen in numbers.rows()] == [1, 2, 3]
    bucket.delete(METRICS)
    assert [seen["step"] for seen in numbers.rows()] == [1, 2, 3]


def test_a_store_that_fails_is_no_trouble_to_who_looks_on(
    root: RunRoot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(publishing, "_LOOK_SECONDS", 0.0)
    (tmp_path / "store").write_bytes(b"in the way")
    assert Numbers(root, root.local / STAGE).rows() == []


def test_numbers_of_an_earlier_run_are_not_shown(root: RunRoot) -> None:
    (root.local / STAGE / "logs").mkdir(parents=True)
    (root.local / STAGE / "logs" / "metrics.jsonl").write_bytes(row(500, 1.0))
    assert Numbers(root, root.local / STAGE).rows() == []
