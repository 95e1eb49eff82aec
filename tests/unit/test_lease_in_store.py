"""A lease that lies in an object store: machines that share nothing else race for a stage, are killed and cut off."""

import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import LeaseError, StorageError
from orchestrator.lease import InStore, held
from orchestrator.lease.held import LEASE_NAME
from orchestrator.run_root import RunRoot
from tests.unit.object_store import Bucket

SPAWN = multiprocessing.get_context("spawn")
STAGE = "attention-0123456789ab"
LEASE = f"{STAGE}/{LEASE_NAME}"
NEVER = 3600.0
"""Seconds; a test that waited for such an expiry would not end."""
NUM_RACES = 10


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    return Bucket(f"folder://{tmp_path}/store/runs")


@pytest.fixture
def place(bucket: Bucket, tmp_path: Path) -> InStore:
    return InStore(RunRoot(tmp_path / "mirror", bucket.url), STAGE)


def race(places: list[InStore], barrier: Barrier, pipe: Connection) -> None:
    wins = []
    for place in places:
        barrier.wait(60)
        try:
            with held(place, "python race.py", lambda text: None, expires_seconds=4):
                wins.append(True)
                barrier.wait(60)
        except LeaseError:
            wins.append(False)
            barrier.wait(60)
    pipe.send(wins)


def hold(place: InStore, pipe: Connection) -> None:
    with held(place, "python other.py"):
        pipe.send("held")
        time.sleep(NEVER)


def keep_rewriting(bucket: Bucket, value: dict[str, Any]) -> None:
    for count in range(100_000):
        bucket.write(LEASE, json.dumps(value | {"renewed": f"{count:029}"}).encode())
        time.sleep(0.02)


def leave_dead_lease(place: InStore) -> None:
    """The lease of a process that was killed."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=hold, args=(place, theirs), daemon=True)
    process.start()
    assert ours.recv() == "held"
    process.kill()
    process.join()


def read(bucket: Bucket) -> dict[str, Any]:
    return json.loads(bucket.read(LEASE))


def lead(folder: Path, target: Path) -> None:
    """Makes the folder a link to there, in one step: a renewal never finds nothing at all."""
    link = folder.with_name("link")
    link.symlink_to(target)
    link.replace(folder)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


@pytest.mark.parametrize("is_dead_one_there", [False, True])
def test_exactly_one_of_two_gets_the_stage(tmp_path: Path, place: InStore, bucket: Bucket, is_dead_one_there: bool) -> None:
    stages = [f"stage-{number:012d}" for number in range(NUM_RACES)]
    if is_dead_one_there:
        leave_dead_lease(place)
        dead = bucket.read(LEASE)
        for stage in stages:
            bucket.write(f"{stage}/{LEASE_NAME}", dead)
        bucket.delete(LEASE)
    barrier, pipes, processes = SPAWN.Barrier(2), [SPAWN.Pipe() for _ in range(2)], []
    for name, (_, theirs) in zip(("one", "other"), pipes, strict=True):
        places = [InStore(RunRoot(tmp_path / name, bucket.url), stage) for stage in stages]
        processes.append(SPAWN.Process(target=race, args=(places, barrier, theirs), daemon=True))
    for process in processes:
        process.start()
    wins = [ours.recv() for ours, _ in pipes]
    for process in processes:
        process.join()
    assert [sum(pair) for pair in zip(*wins, strict=True)] == [1] * NUM_RACES
    assert bucket.names() == set()


def test_the_refused_is_told_who_holds_the_stage(place: InStore, bucket: Bucket, tmp_path: Path) -> None:
    elsewhere = InStore(RunRoot(tmp_path / "elsewhere", bucket.url), STAGE)
    with held(place, "python launch/run.py recipe=中文 stage=2"), pytest.raises(LeaseError) as caught, held(elsewhere, "b"):
        pass
    assert re.fullmatch(
        rf"{bucket.url}/{STAGE}: is being run by \w+@{os.uname().nodename} \(process {os.getpid()}\) since .*: "
        r"python launch/run\.py recipe=中文 stage=2; wait for it, or stop it there",
        str(caught.value),
    )


def test_the_lease_goes_with_the_block_and_leaves_nothing_in_the_mirror(place: InStore, bucket: Bucket) -> None:
    with held(place, "a") as lease:
        assert bucket.names() == {LEASE}
        assert not lease.is_lost
    assert bucket.names() == set()
    assert not place.root.local.exists()


def test_a_holder_of_this_machine_that_was_killed_is_succeeded_at_once(place: InStore, bucket: Bucket) -> None:
    leave_dead_lease(place)
    said: list[str] = []
    with held(place, "next", said.append, expires_seconds=NEVER):
        assert read(bucket)["pid"] == os.getpid()
        assert bucket.names() == {LEASE}, "a claim was left"
    (line,) = said
    assert line.startswith(f"{bucket.url}/{STAGE}: taken over from a run that has ended: ")


def test_a_holder_of_another_machine_holds_while_it_renews(place: InStore, bucket: Bucket) -> None:
    leave_dead_lease(place)
    elsewhere = read(bucket) | {"host": "another"}
    holder = SPAWN.Process(target=keep_rewriting, args=(bucket, elsewhere), daemon=True)
    holder.start()
    wait_until(lambda: read(bucket).get("renewed", "").startswith("000"))
    with pytest.raises(LeaseError, match="is being run by"), held(place, "next", lambda text: None, expires_seconds=2):
        pass
    holder.kill()
    holder.join()
    said: list[str] = []
    with held(place, "next", said.append, expires_seconds=0.2):
        assert read(bucket)["command"] == "next"
    assert "waiting up to 0.2 seconds" in said[0]
    assert "taken over" in said[1]


def test_renewing_changes_what_others_see(place: InStore, bucket: Bucket) -> None:
    with held(place, "a", renew_seconds=0.01) as lease:
        before = read(bucket)
        wait_until(lambda: read(bucket)["renewed"] > before["renewed"])
        assert read(bucket) | {"renewed": before["renewed"]} == before
        lease.check()


def test_a_lease_that_another_took_is_lost_and_stays_theirs(place: InStore, bucket: Bucket) -> None:
    with held(place, "a", renew_seconds=0.01) as lease:
        theirs = json.dumps(read(bucket) | {"id": "theirs", "user": "ana", "host": "gpu-7"}).encode()
        # Again, where a renewal that was under way has replaced it.
        wait_until(lambda: bucket.write(LEASE, theirs) or lease.is_lost)
        with pytest.raises(LeaseError, match=rf"^{bucket.url}/{STAGE}: it is now run by ana@gpu-7 .*; this run stops"):
            lease.check()
    assert bucket.read(LEASE) == theirs


def test_a_lease_that_is_removed_is_lost(place: InStore, bucket: Bucket) -> None:
    with held(place, "a", renew_seconds=0.01) as lease:
        # Again, where a renewal that was under way has brought it back.
        wait_until(lambda: place.remove(LEASE_NAME) or lease.is_lost)
        with pytest.raises(LeaseError, match=r"lease\.json was removed"):
            lease.check()


def test_who_may_have_replaced_a_successors_lease_gives_up(
    place: InStore, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that slept between its look and its write finds its own lease there when it looks again."""
    write, sleeps = RunRoot.write, [0.3]

    def write_late_once(self: RunRoot, path: str, content: bytes) -> None:
        if sleeps:
            time.sleep(sleeps.pop())
        write(self, path, content)

    monkeypatch.setattr(RunRoot, "write", write_late_once)
    with held(place, "a", renew_seconds=0.02, expires_seconds=0.2) as lease:
        first = read(bucket)
        wait_until(lambda: read(bucket)["renewed"] > first["renewed"])
        # Time for the renewals that would follow.
        time.sleep(0.1)
        with pytest.raises(LeaseError, match=r"could not be renewed for 0\.2 seconds"):
            lease.check()
    assert bucket.names() == {LEASE}, "it may be a successor's"


def test_a_store_whose_answer_was_lost_has_given_the_lease_all_the_same(place: InStore) -> None:
    assert place.create(LEASE_NAME, b"ours")
    assert place.create(LEASE_NAME, b"ours")
    assert place.create(LEASE_NAME, b"theirs") is None


def test_a_store_that_fails_loses_the_lease_only_after_the_expiry(place: InStore, bucket: Bucket) -> None:
    folder = Path(bucket.url.removeprefix("folder://")) / STAGE
    real = folder.with_name("real")
    real.mkdir(parents=True)
    lead(folder, real)
    with held(place, "a", renew_seconds=0.02, expires_seconds=5) as lease:
        # A link to itself cannot be opened.
        lead(folder, folder)
        time.sleep(0.2)
        assert not lease.is_lost
        lead(folder, real)
        before = read(bucket)
        wait_until(lambda: read(bucket) != before)
        lead(folder, folder)
        wait_until(lambda: lease.is_lost)
        with pytest.raises(LeaseError, match=r"could not be renewed for 5 seconds.*Too many levels of symbolic links"):
            lease.check()


def test_a_store_that_cannot_be_written_to_is_named(place: InStore, bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "store").write_bytes(b"in the way")
    with pytest.raises(StorageError, match=f"{bucket.url}/{LEASE}: cannot be written"), held(place, "a"):
        pass
