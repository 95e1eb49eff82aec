"""What one rank does to the others though nobody kills it: it stands still, it fails, it cannot start."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from orchestrator.cluster.attempt import Ended, Watch, Work, run_attempt
from orchestrator.cluster.failures import Failure
from orchestrator.cluster.group import WorkerGroup
from orchestrator.cluster.session import connected
from orchestrator.cluster.sizing import Size
from orchestrator.schema import LocalCluster
from orchestrator.train.link import Link

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timed, pytest.mark.timeout(200)]

SIZE = Size((2,), gpus=0, cpus=1)
HANG_SECONDS = 4.0
NOTICED_SECONDS = 10.0
"""What may be added to that."""


def steps_together(fault: str, link: Link) -> int:
    """Five steps; after three of them something may happen to rank 1 while rank 0 goes on."""
    link.note({"event": "begin", "pid": os.getpid()})
    for step in range(5):
        link.beat(step, "reading its batch")
        if dist.get_rank() == 1 and step == 3:
            link.note({"event": "fault", "time": time.time()})
            if fault == "hang":
                a_read_that_never_ends()
            if fault == "error":
                raise ValueError("the rows are not what they were")
        link.beat(step, "computing")
        dist.all_reduce(torch.zeros(1))
        link.beat(step + 1, "between steps")
    return 5


def a_read_that_never_ends() -> None:
    threading.Event().wait()


def speak_until_killed(spoken: Path, link: Link) -> None:
    """Rank 1 leaves; rank 0 goes on to send notes, and keeps a byte of each that it has sent."""
    if dist.get_rank() == 1:
        time.sleep(0.3)
        os._exit(5)
    with spoken.open("ab", buffering=0) as file:
        while True:
            link.note({"event": "spoken"})
            file.write(b".")
            time.sleep(0.002)


@pytest.fixture(scope="module")
def group() -> Iterator[WorkerGroup]:
    """Two workers; when they are let go, nothing of them is left."""
    with connected(LocalCluster(kind="local")):
        with closing(WorkerGroup(SIZE, ("torch.distributed",), print, wait_seconds=60)) as found:
            yield found
        processes = psutil.Process().children(recursive=True)
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []


def attempt(fault: str, group: WorkerGroup, logs: Path) -> tuple[Ended | Failure, list[Any]]:
    return run(Work(steps_together, fault, logs), group)


def run(work: Work, group: WorkerGroup) -> tuple[Ended | Failure, list[Any]]:
    """What came of it, and all notes."""
    notes: list[Any] = []
    members = group.members(lambda: False)
    assert members is not None
    return run_attempt(work, members, Watch(HANG_SECONDS, lambda: None, notes.append)), notes


def test_a_rank_that_hangs_is_noticed_named_and_shown(group: WorkerGroup, tmp_path: Path) -> None:
    failure, notes = attempt("hang", group, tmp_path)
    ended = time.time()
    assert isinstance(failure, Failure)
    assert (failure.cause, failure.rank, failure.step, failure.error) == ("hang", 1, 3, None)
    assert failure.message.startswith("hangs in reading its batch after step 3: no progress for ")
    (hung,) = [note["time"] for note in notes if note["event"] == "fault"]
    assert HANG_SECONDS < ended - hung < HANG_SECONDS + NOTICED_SECONDS
    assert "most recent call first" in failure.detail
    assert "in a_read_that_never_ends" in failure.detail
    pids = [note["pid"] for note in notes if note["event"] == "begin"]
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_the_rank_that_failed_is_named_and_not_the_one_whose_connection_it_broke(group: WorkerGroup, tmp_path: Path) -> None:
    failure, _ = attempt("error", group, tmp_path)
    assert isinstance(failure, Failure)
    assert (failure.cause, failure.rank, failure.error) == ("error", 1, None)
    assert failure.message == "failed: ValueError: the rows are not what they were"
    assert "in steps_together" in failure.detail
    assert "RuntimeError" in (tmp_path / "rank-0.log").read_text()


def test_what_the_others_said_before_they_were_killed_is_heard(group: WorkerGroup, tmp_path: Path) -> None:
    failure, notes = run(Work(speak_until_killed, tmp_path / "spoken", tmp_path), group)
    assert isinstance(failure, Failure)
    assert (failure.cause, failure.rank, failure.message) == ("worker_lost", 1, "exited with 5")
    assert len(notes) >= (tmp_path / "spoken").stat().st_size > 0


def test_the_same_workers_try_again(group: WorkerGroup, tmp_path: Path) -> None:
    outcome, notes = attempt("none", group, tmp_path)
    assert outcome == Ended(5, None)
    assert sum(note["event"] == "begin" for note in notes) == 2


def test_a_rank_that_cannot_start_says_why(group: WorkerGroup, tmp_path: Path) -> None:
    group.close()
    with closing(WorkerGroup(SIZE, ("no_such_module",), print, wait_seconds=60)) as incomplete:
        failure, _ = attempt("none", incomplete, tmp_path)
    assert isinstance(failure, Failure)
    assert (failure.cause, failure.rank, failure.message) == ("error", 0, "could not start")
    assert "No module named 'no_such_module'" in failure.detail
