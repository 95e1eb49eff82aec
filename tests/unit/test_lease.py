"""One stage has one holder: real processes race for it, are killed, stopped and cut off."""

import ctypes
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import LeaseError, StorageError
from orchestrator.lease import InFolder, held
from orchestrator.lease.held import LEASE_NAME

SPAWN = multiprocessing.get_context("spawn")
NEVER = 3600.0
"""Seconds; a test that waited for such an expiry would not end."""
NUM_RACES = 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "attention-0123456789ab"


class Other:
    """Another process that tried to hold a stage; `answer` is "held", or why not."""

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self.process, self._pipe = process, pipe
        self.answer = pipe.recv()
        assert process.pid is not None
        self.pid = process.pid

    def ask(self, question: str) -> str:
        self._pipe.send(question)
        assert self._pipe.poll(20), f"no answer to {question}"
        return self._pipe.recv()


@contextmanager
def other(folder: Path, renew_seconds: float = 0.05, expires_seconds: float = NEVER) -> Iterator[Other]:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=hold, args=(folder, theirs, renew_seconds, expires_seconds), daemon=True)
    process.start()
    try:
        yield Other(process, ours)
    finally:
        process.kill()
        process.join()


def hold(folder: Path, pipe: Connection, renew_seconds: float, expires_seconds: float) -> None:
    try:
        with held(InFolder(folder), "python other.py", lambda text: None, renew_seconds, expires_seconds) as lease:
            pipe.send("held")
            while (question := pipe.recv()) != "release":
                try:
                    lease.check()
                    pipe.send(f"{question}: ours")
                except LeaseError as error:
                    pipe.send(str(error))
        pipe.send("released")
    except LeaseError as error:
        pipe.send(str(error))


def race(folders: list[Path], barrier: Barrier, pipe: Connection) -> None:
    wins = []
    for folder in folders:
        barrier.wait(60)
        try:
            with held(InFolder(folder), "python race.py", lambda text: None, expires_seconds=2):
                wins.append(True)
                barrier.wait(60)
        except LeaseError:
            wins.append(False)
            barrier.wait(60)
    pipe.send(wins)


def keep_rewriting(path: Path, value: dict[str, Any]) -> None:
    for count in range(100_000):
        path.write_text(json.dumps(value | {"renewed": f"{count:029}"}))
        time.sleep(0.02)


def take_over_and_die_midway(folder: Path, num_removed: int) -> None:
    """A taker removes first the dead lease and then its own claim."""
    unlink, left = Path.unlink, [None] * num_removed

    def unlink_or_die(self: Path, missing_ok: bool = False) -> None:
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left.pop()
        unlink(self, missing_ok)

    Path.unlink = unlink_or_die
    with held(InFolder(folder), "python killed.py"):
        raise AssertionError("took over without removing the dead lease")


def leave_dead_lease(folder: Path) -> dict[str, Any]:
    """The lease of a process that was killed."""
    with other(folder) as killed:
        assert killed.answer == "held"
    return read(folder)


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / LEASE_NAME).read_text(encoding="utf-8"))


def write(folder: Path, value: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LEASE_NAME).write_text(json.dumps(value), encoding="utf-8")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def dead_lease(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return leave_dead_lease(tmp_path_factory.mktemp("dead"))


@pytest.mark.parametrize("is_dead_one_there", [False, True])
def test_exactly_one_of_two_gets_the_stage(tmp_path: Path, dead_lease: dict[str, Any], is_dead_one_there: bool) -> None:
    folders = [tmp_path / f"{number}" for number in range(NUM_RACES)]
    for folder in folders if is_dead_one_there else ():
        write(folder, dead_lease)
    barrier, pipes = SPAWN.Barrier(2), [SPAWN.Pipe() for _ in range(2)]
    processes = [SPAWN.Process(target=race, args=(folders, barrier, theirs), daemon=True) for _, theirs in pipes]
    for process in processes:
        process.start()
    wins = [ours.recv() for ours, _ in pipes]
    for process in processes:
        process.join()
    assert [sum(pair) for pair in zip(*wins, strict=True)] == [1] * NUM_RACES
    assert [list(folder.iterdir()) for folder in folders] == [[]] * NUM_RACES


def test_the_refused_is_told_who_holds_the_stage_and_since_when(folder: Path) -> None:
    with held(InFolder(folder), "python launch/run.py recipe=中文 stage=2"):
        with other(folder) as refused:
            assert re.fullmatch(
                rf"{folder}: is being run by \w+@{os.uname().nodename} \(process {os.getpid()}\) "
                r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(\d seconds\): "
                r"python launch/run\.py recipe=中文 stage=2; wait for it, or stop it there",
                refused.answer,
            )
        with pytest.raises(LeaseError, match="is being run by"), held(InFolder(folder), "the same process"):
            pass
        assert read(folder)["command"] == "python launch/run.py recipe=中文 stage=2"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 seconds"), (59, "59 seconds"), (61, "1 minute"), (12 * 60, "12 minutes"), (180_000, "2 days")],
)
def test_the_time_since_is_in_words(folder: Path, seconds: int, text: str) -> None:
    with held(InFolder(folder), "a"):
        since = time.strftime("%Y-%m-%dT%H:%M:%S.000+00:00", time.gmtime(time.time() - seconds))
        write(folder, read(folder) | {"since": since})
        with pytest.raises(LeaseError, match=rf"\({text}\)"), held(InFolder(folder), "b"):
            pass


def test_the_lease_goes_with_the_block_and_with_an_exception(folder: Path) -> None:
    with held(InFolder(folder), "a") as lease:
        assert [path.name for path in folder.iterdir()] == [LEASE_NAME]
        assert not lease.is_lost
    assert list(folder.iterdir()) == []
    with pytest.raises(ZeroDivisionError), held(InFolder(folder), "a"):
        raise ZeroDivisionError
    assert list(folder.iterdir()) == []


def test_a_holder_that_was_killed_is_succeeded_at_once(folder: Path, dead_lease: dict[str, Any]) -> None:
    write(folder, dead_lease)
    said: list[str] = []
    with held(InFolder(folder), "next", said.append, expires_seconds=NEVER):
        assert read(folder)["pid"] == os.getpid()
    (line,) = said
    assert line.startswith(f"{folder}: taken over from a run that has ended: ")
    assert line.endswith(": python other.py")


def test_a_killed_holder_counts_as_dead_before_its_parent_has_asked(folder: Path) -> None:
    with other(folder) as killed:
        os.kill(killed.pid, signal.SIGKILL)
        os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)
        with held(InFolder(folder), "next", expires_seconds=NEVER):
            assert Path(f"/proc/{killed.pid}/stat").exists()


def test_a_process_whose_first_thread_has_ended_still_holds(folder: Path) -> None:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=hold_and_end_first_thread, args=(folder, theirs), daemon=True)
    process.start()
    ours.recv()
    state = Path(f"/proc/{process.pid}/stat")
    wait_until(lambda: ") Z " in state.read_text())
    with pytest.raises(LeaseError, match=f"process {process.pid}"), held(InFolder(folder), "next"):
        pass
    process.kill()
    process.join()


def hold_and_end_first_thread(folder: Path, pipe: Connection) -> None:
    with held(InFolder(folder), "a"):
        pipe.send("held")
        # What exit(2) is called by number: it ends the thread that calls it, and no other.
        ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)


def test_a_stopped_process_of_this_machine_still_holds(folder: Path) -> None:
    with other(folder, renew_seconds=30, expires_seconds=0.1) as stopped:
        os.kill(stopped.pid, signal.SIGSTOP)
        time.sleep(0.3)
        with pytest.raises(LeaseError, match=f"process {stopped.pid}"), held(InFolder(folder), "next", expires_seconds=0.1):
            pass
        os.kill(stopped.pid, signal.SIGCONT)
        assert stopped.ask("whose") == "whose: ours"
        assert stopped.ask("release") == "released"
    assert list(folder.iterdir()) == []


def test_a_later_process_with_the_holders_number_is_not_the_holder(folder: Path) -> None:
    with held(InFolder(folder), "a"):
        ours = read(folder)
    write(folder, ours)
    with pytest.raises(LeaseError), held(InFolder(folder), "b", expires_seconds=NEVER):
        pass
    write(folder, ours | {"process_started": ours["process_started"] - 1})
    with held(InFolder(folder), "b", expires_seconds=NEVER):
        pass


@pytest.mark.parametrize("field", ["host", "boot_id", "pid_namespace"])
def test_a_holder_out_of_sight_holds_while_it_renews(folder: Path, dead_lease: dict[str, Any], field: str) -> None:
    elsewhere = dead_lease | {field: "another"}
    write(folder, elsewhere)
    holder = SPAWN.Process(target=keep_rewriting, args=(folder / LEASE_NAME, elsewhere), daemon=True)
    holder.start()
    wait_until(lambda: read_or_none(folder) not in (None, elsewhere))
    said: list[str] = []
    with pytest.raises(LeaseError, match="is being run by"), held(InFolder(folder), "next", said.append, expires_seconds=2):
        pass
    holder.kill()
    holder.join()
    write(folder, elsewhere)
    with held(InFolder(folder), "next", said.append, expires_seconds=0.2):
        assert read(folder)["command"] == "next"
    *waiting, last = [line.partition(": ")[2].partition(":")[0] for line in said]
    assert waiting[-1] == "waiting up to 0.2 seconds to see whether another run goes on"
    assert last == "taken over from a run that has ended"


def read_or_none(folder: Path) -> dict[str, Any] | None:
    with suppress(ValueError):
        return read(folder)
    return None


def test_a_lease_whose_maker_died_before_writing_it_expires(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / LEASE_NAME).touch()
    said: list[str] = []
    with held(InFolder(folder), "next", said.append, expires_seconds=0.2):
        assert read(folder)["command"] == "next"
    assert said[-1] == f"{folder}: taken over from a run that has ended: a run that has not said who it is"


def test_a_lease_in_another_format_is_respected_while_it_is_renewed(folder: Path) -> None:
    write(folder, {})
    holder = SPAWN.Process(target=keep_rewriting, args=(folder / LEASE_NAME, {"format": 2}), daemon=True)
    holder.start()
    wait_until(lambda: read_or_none(folder) not in (None, {}))
    with (
        pytest.raises(LeaseError, match="a run that has not said who it is"),
        held(InFolder(folder), "next", expires_seconds=2),
    ):
        pass
    holder.kill()
    holder.join()


def test_the_slower_of_two_takers_does_not_remove_what_the_faster_made(folder: Path, dead_lease: dict[str, Any]) -> None:
    write(folder, dead_lease)
    faster = other(folder)
    answers: list[str] = []

    def let_another_take_over(said: str) -> None:
        assert "taken over" in said
        answers.append(faster.__enter__().answer)

    with pytest.raises(LeaseError, match=r"python other\.py"), held(InFolder(folder), "slower", let_another_take_over):
        pass
    assert answers == ["held"]
    assert [path.name for path in folder.iterdir()] == [LEASE_NAME]
    faster.__exit__(None, None, None)


@pytest.mark.parametrize("num_removed", [0, 1])
def test_a_taker_that_was_killed_midway_stands_in_nobodys_way(
    folder: Path, dead_lease: dict[str, Any], num_removed: int
) -> None:
    write(folder, dead_lease)
    taker = SPAWN.Process(target=take_over_and_die_midway, args=(folder, num_removed))
    taker.start()
    taker.join()
    assert taker.exitcode == -signal.SIGKILL
    assert (folder / LEASE_NAME).exists() == (num_removed == 0)
    assert len([path for path in folder.iterdir() if path.name != LEASE_NAME]) == 1
    with held(InFolder(folder), "next", expires_seconds=NEVER):
        assert [path.name for path in folder.iterdir()] == [LEASE_NAME]


def test_renewing_rewrites_the_same_file_in_the_same_size(folder: Path) -> None:
    with held(InFolder(folder), "a", renew_seconds=0.01):
        path = folder / LEASE_NAME
        before, status = read(folder), path.stat()
        wait_until(lambda: path.read_bytes() != json.dumps(before, indent=2).encode() + b"\n")
        assert (path.stat().st_ino, path.stat().st_size) == (status.st_ino, status.st_size)
        after = read(folder)
        assert after["renewed"] > before["renewed"]
        assert after | {"renewed": before["renewed"]} == before


@pytest.mark.parametrize(("renew_seconds", "expires_seconds"), [(0.01, NEVER), (NEVER, 0.1)])
def test_a_lease_that_another_took_is_lost_and_never_written_again(
    folder: Path, renew_seconds: float, expires_seconds: float
) -> None:
    """With renewals far apart it is noticed as well: an overdue lease is looked at before anything is said of it."""
    with held(InFolder(folder), "a", renew_seconds=renew_seconds, expires_seconds=expires_seconds) as lease:
        theirs = json.dumps(read(folder) | {"id": "theirs", "user": "ana", "host": "gpu-7"})
        (folder / "new").write_text(theirs)
        (folder / "new").replace(folder / LEASE_NAME)
        wait_until(lambda: lease.is_lost)
        with pytest.raises(LeaseError, match=rf"^{folder}: it is now run by ana@gpu-7 .*; this run stops"):
            lease.check()
        assert lease.is_lost
    assert (folder / LEASE_NAME).read_text() == theirs


def test_a_lease_whose_folder_is_removed_is_lost(folder: Path) -> None:
    with held(InFolder(folder), "a", renew_seconds=0.01) as lease:
        shutil.rmtree(folder)
        wait_until(lambda: lease.is_lost)
        with pytest.raises(LeaseError, match=r"lease\.json was removed"):
            lease.check()
    assert not folder.exists()


def test_a_holder_that_was_asleep_while_another_took_over_knows_as_soon_as_it_asks(folder: Path) -> None:
    with other(folder, renew_seconds=30, expires_seconds=0.1) as asleep:
        os.kill(asleep.pid, signal.SIGSTOP)
        (folder / LEASE_NAME).unlink()
        with held(InFolder(folder), "next"):
            time.sleep(0.2)
            os.kill(asleep.pid, signal.SIGCONT)
            assert "it is now run by" in asleep.ask("whose")
            assert asleep.ask("release") == "released"
            assert read(folder)["command"] == "next"


def test_storage_that_fails_loses_the_lease_only_after_the_expiry(folder: Path) -> None:
    path, aside, loop = folder / LEASE_NAME, folder / "aside", folder / "loop"
    with held(InFolder(folder), "a", renew_seconds=0.02, expires_seconds=2) as lease:
        os.link(path, aside)
        loop.symlink_to(path)
        # A link to itself cannot be opened; each replacement is one rename, so the lease is never missing.
        loop.replace(path)
        time.sleep(0.2)
        assert not lease.is_lost
        aside.replace(path)
        before = read(folder)
        wait_until(lambda: read(folder) != before)
        loop.symlink_to(path)
        loop.replace(path)
        wait_until(lambda: lease.is_lost)
        with pytest.raises(LeaseError, match=r"could not be renewed for 2 seconds.*Too many levels of symbolic links"):
            lease.check()
    assert path.is_symlink(), "a lost lease is not removed"


def test_storage_that_hangs_loses_the_lease_and_holds_nobody_up(folder: Path) -> None:
    path, pipe = folder / LEASE_NAME, folder / "pipe"
    with held(InFolder(folder), "a", renew_seconds=0.05, expires_seconds=0.1) as lease:
        os.mkfifo(pipe)
        # Whoever opens it to read waits until somebody opens it to write.
        pipe.replace(path)
        wait_until(lambda: lease.is_lost)
        with pytest.raises(LeaseError, match=r"could not be renewed for 0\.1 seconds.*the storage does not answer"):
            lease.check()
    assert any(str(path) in name for name in open_files()), "closed while the hanging thread may yet write to it"
    path.open("wb").close()


def open_files() -> Iterator[str]:
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            yield os.readlink(link)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with (
        pytest.raises(StorageError, match=r"file/stage/lease\.json: the stage cannot be reserved"),
        held(InFolder(tmp_path / "file" / "stage"), "a"),
    ):
        pass
