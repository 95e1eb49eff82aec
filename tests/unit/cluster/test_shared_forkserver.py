"""One process that imports for all workers of a machine: whose processes end with whom, and who takes over from it."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.cluster.forkserver_client import reach, shared_forkserver
from orchestrator.cluster.messages import Died, Finished
from orchestrator.cluster.worker import Worker
from tests.shared_data import ROOT
from tests.unit.cluster import rank_bodies
from tests.unit.cluster.test_worker import PRELOADED, SECONDS, ending, forkservers, is_gone, job, wait_until, waiting_pid

NOBODY = 65534


@pytest.fixture(scope="module")
def shared() -> Iterator[str]:
    with shared_forkserver(PRELOADED) as name:
        yield name


@pytest.fixture(scope="module")
def pair(shared: str) -> list[Worker]:
    return [Worker(PRELOADED, shared), Worker(PRELOADED, shared)]


@pytest.fixture(autouse=True)
def nothing_left(pair: list[Worker]) -> Iterator[None]:
    yield
    for worker in pair:
        worker.kill()


def test_all_workers_have_their_processes_from_it(pair: list[Worker], tmp_path: Path) -> None:
    (server,) = forkservers()
    for worker in pair:
        worker.start(job(rank_bodies.process_and_parent, None, tmp_path / "log"))
        assert ending(worker).result[1] == server.pid


def test_what_a_terminal_sends_to_the_command_is_not_meant_for_it(shared: str) -> None:
    (server,) = forkservers()
    assert os.getsid(server.pid) == server.pid != os.getsid(0)


def test_a_process_ends_before_the_command_where_memory_runs_out(pair: list[Worker], tmp_path: Path) -> None:
    pair[0].start(job(rank_bodies.memory_is_short, None, tmp_path / "log"))
    assert ending(pair[0]) == Finished(1000)


def test_a_worker_takes_its_own_process_with_it(pair: list[Worker], shared: str, tmp_path: Path) -> None:
    pair[0].start(job(rank_bodies.hang, None, tmp_path / "log"))
    stays = waiting_pid(pair[0])
    holder = [sys.executable, "-m", "tests.unit.cluster.holder", str(tmp_path / "other"), shared]
    with subprocess.Popen(holder, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        goes = psutil.Process(int(process.stdout.readline()))
        assert goes.ppid() == psutil.Process(stays).ppid()
        # It would hear nothing of its worker's end.
        goes.suspend()
        process.kill()
        wait_until(lambda: is_gone(goes.pid), seconds=10)
    assert psutil.pid_exists(stays)
    pair[0].kill()
    assert ending(pair[0]) == Died(signal=9, exit_code=None)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_other_users_are_not_served(shared: str) -> None:
    os.seteuid(NOBODY)
    try:
        stranger = reach(shared)
    finally:
        os.seteuid(0)
    assert stranger
    with pytest.raises(RuntimeError, match="is gone"):
        stranger.fork()


def test_a_name_that_nobody_has_is_not_reached() -> None:
    assert reach("orchestrator-of-nobody") is None


def test_when_it_is_gone_each_worker_has_its_own(tmp_path: Path) -> None:
    with shared_forkserver(PRELOADED) as name:
        (server,) = [each for each in forkservers() if each.create_time() == max(e.create_time() for e in forkservers())]
        worker = Worker(PRELOADED, name)
        worker.start(job(rank_bodies.hang, None, tmp_path / "log"))
        pid = waiting_pid(worker)
        server.send_signal(signal.SIGKILL)
        assert isinstance(ending(worker), Died)
        wait_until(lambda: is_gone(pid))
        worker.start(job(rank_bodies.process_and_parent, None, tmp_path / "log"))
        own = ending(worker).result[1]
        assert own != server.pid
        assert psutil.Process(own).ppid() == os.getpid()


def test_an_import_that_fails_is_shown_by_the_workers_own(tmp_path: Path) -> None:
    with shared_forkserver(("no_such_module",)) as name:
        worker = Worker(("no_such_module",), name)
        with pytest.raises(RuntimeError, match="No module named 'no_such_module'"):
            worker.start(job(rank_bodies.hang, None, tmp_path / "log"))


@pytest.mark.slow
def test_what_uses_the_gpu_is_not_shared(tmp_path: Path) -> None:
    modules = (*PRELOADED, "tests.unit.cluster.gpu_in_use")
    with shared_forkserver(modules) as name:
        worker = Worker(modules, name)
        worker.start(job(rank_bodies.process_and_parent, None, tmp_path / "log"))
        # With a GPU in use the forkserver itself becomes the process, and this worker's own was asked.
        assert ending(worker).result[1] == os.getpid()


def test_it_ends_with_the_command_that_started_it() -> None:
    code = f"""
import time
from orchestrator.cluster.forkserver_client import shared_forkserver
with shared_forkserver({PRELOADED!r}) as name:
    print(name, flush=True)
    time.sleep({SECONDS})
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout
        name = command.stdout.readline().strip()
        (server,) = psutil.Process(command.pid).children()
        command.kill()
        wait_until(lambda: is_gone(server.pid))
    with socket.socket(socket.AF_UNIX) as channel, pytest.raises(ConnectionRefusedError):
        channel.connect(f"\0{name}")
