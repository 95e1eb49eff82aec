"""A rank's process as its worker holds it: what it says, every way in which it can end, and that nothing of it is left."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.cluster.messages import Beat, Died, Finished, Job, Place, Raised, Report
from orchestrator.cluster.worker import Worker
from orchestrator.errors import Interrupted, OrchestratorError, RecipeError
from orchestrator.train.link import Link
from tests.shared_data import ROOT
from tests.unit.cluster import rank_bodies

PRELOADED = ("torch.distributed", rank_bodies.__name__)
SECONDS = 60

Start = Callable[..., Worker]


@pytest.fixture(scope="module", autouse=True)
def nothing_left() -> Iterator[None]:
    """A worker's forkserver ends with the process that holds the worker, which is this one."""
    yield
    for process in forkservers():
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def pair() -> list[Worker]:
    """Two, which import at the same time."""
    with pytest.MonkeyPatch.context() as patch:
        # What a process prints is to be seen without its help.
        patch.delenv("PYTHONUNBUFFERED", raising=False)
        return [Worker(PRELOADED), Worker(PRELOADED)]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "rank-0.log"


@pytest.fixture
def start(pair: list[Worker], log: Path) -> Iterator[Start]:
    """Starts one rank by itself on the first worker."""

    def begin(body: Callable[[Any, Link], Any], assignment: Any = None) -> Worker:
        assert pair[0].start(job(body, assignment, log)) is not None
        return pair[0]

    yield begin
    pair[0].kill()


def job(
    body: Callable[[Any, Link], Any],
    assignment: Any,
    log: Path,
    place: tuple[int, int] = (0, 1),
    meeting: tuple[str, int] | None = None,
) -> Job:
    rank, num_workers = place
    return Job(body, assignment, Place(rank, num_workers, rank, num_workers, 0, "127.0.0.1"), "gloo", meeting, log, None)


def heard(worker: Worker) -> tuple[Report, list[Any]]:
    """The report of the process's end, and all notes until then."""
    notes: list[Any] = []
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        report = worker.report(SECONDS)
        notes += report.notes
        if report.ending is not None:
            return report, notes
    raise AssertionError(f"no end within {SECONDS} seconds, only {notes}")


def ending(worker: Worker) -> Any:
    return heard(worker)[0].ending


def waiting_pid(worker: Worker) -> int:
    """The process, once its body waits."""
    (note,) = worker.report(SECONDS).notes
    assert note["event"] == "waiting"
    return note["pid"]


def forkservers() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if "orchestrator.cluster.forkserver" in each.cmdline()]


def wait_until(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} seconds"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_two_ranks_meet_and_say_what_they_do_and_what_came_of_it(pair: list[Worker], tmp_path: Path) -> None:
    logs = [tmp_path / f"rank-{rank}.log" for rank in (0, 1)]
    port = pair[0].start(job(rank_bodies.say_and_return, "zero", logs[0], (0, 2)))
    assert port is not None
    assert pair[1].start(job(rank_bodies.say_and_return, "one", logs[1], (1, 2), ("127.0.0.1", port))) is None
    for worker, log, assignment in zip(pair, logs, ("zero", "one"), strict=True):
        report, notes = heard(worker)
        assert report.ending == Finished((assignment, 1 + 2))
        assert report.beat == Beat(7, "computing")
        assert notes == [{"event": "first"}, {"event": "second", "step": 7}]
        assert log.read_text().splitlines() == ["said to stdout", "said to stderr"]


def test_every_process_is_forked_by_the_one_that_has_imported_all(start: Start) -> None:
    (first, parent), (second, same_parent) = (ending(start(rank_bodies.process_and_parent)).result for _ in range(2))
    assert first != second
    assert parent == same_parent
    assert parent in [process.pid for process in forkservers()]


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("memory", "out_of_memory", "MemoryError: of the host"),
        ("memory of torch", "out_of_memory", "RuntimeError: "),
        ("memory of a GPU", "out_of_memory", "OutOfMemoryError: CUDA out of memory"),
        ("other", "other", "ValueError: what nobody foresaw"),
        ("exit", "other", "SystemExit: a vendor's opinion"),
    ],
)
def test_an_error_says_what_it_is(start: Start, log: Path, how: str, kind: str, message: str) -> None:
    before = time.time()
    raised = ending(start(rank_bodies.fail, how))
    assert isinstance(raised, Raised)
    assert (raised.kind, raised.error) == (kind, None)
    assert raised.message.startswith(message)
    assert "in fail\n" in raised.traceback
    assert "in fail\n" in log.read_text()
    assert before < raised.at < time.time()


def test_an_error_of_ours_keeps_its_class_and_message(start: Start) -> None:
    raised = ending(start(rank_bodies.fail, "ours"))
    assert raised.kind == "ours"
    assert isinstance(raised.error, RecipeError)
    assert str(raised.error) == raised.message == "q_prog names no linear layer\nand there is more"
    assert "KeyError" in raised.traceback


def every(kind: type[OrchestratorError]) -> list[type[OrchestratorError]]:
    return [kind, *(each for below in kind.__subclasses__() for each in every(below))]


@pytest.mark.parametrize("kind", every(OrchestratorError), ids=lambda kind: kind.__name__)
def test_every_error_of_ours_can_travel(kind: type[OrchestratorError]) -> None:
    error = Interrupted("why", 2) if kind is Interrupted else kind("why")
    arrived = pickle.loads(pickle.dumps(error))
    assert (type(arrived), str(arrived), vars(arrived)) == (kind, "why", vars(error))


@pytest.mark.parametrize(
    ("how", "message"), [("pickling", "cannot pickle '_thread.lock'"), ("reading", "missing 1 required")]
)
def test_a_result_that_does_not_travel_is_an_error_and_no_silent_death(start: Start, how: str, message: str) -> None:
    raised = ending(start(rank_bodies.return_what_does_not_travel, how))
    assert isinstance(raised, Raised)
    assert raised.message.startswith("TypeError")
    assert message in raised.message


def test_what_was_said_last_arrives_however_much_it_is(start: Start) -> None:
    report, _ = heard(start(rank_bodies.return_much, 20_000_000))
    assert report.ending == Finished(bytes(20_000_000))
    assert report.beat == Beat(999, "computing")


@pytest.mark.parametrize("code", [3, 0])
def test_a_process_that_just_leaves_is_not_taken_for_finished(start: Start, log: Path, code: int) -> None:
    died = ending(start(rank_bodies.leave, code))
    assert died == Died(signal=None, exit_code=code)
    assert str(died) == f"exited with {code}"
    assert log.read_text() == "on its way out"


def test_a_killed_process_is_known_by_its_signal(start: Start) -> None:
    worker = start(rank_bodies.hang)
    os.kill(waiting_pid(worker), signal.SIGKILL)
    report, _ = heard(worker)
    assert report.ending == Died(signal=9, exit_code=None)
    assert str(report.ending) == "was killed by signal 9"
    assert report.beat == Beat(3, "computing")


def test_a_hanging_process_says_where_it_stands_and_is_killed(start: Start) -> None:
    worker = start(rank_bodies.hang)
    pid = waiting_pid(worker)
    first, second = worker.report(0.0), worker.report(0.05)
    assert not first.stopped
    assert second.silent_seconds > first.silent_seconds
    stack = worker.stack()
    assert "most recent call first" in stack
    assert "in a_function_that_hangs" in stack
    worker.kill()
    assert ending(worker) == Died(signal=9, exit_code=None)
    assert not psutil.pid_exists(pid)


def test_a_stopped_process_is_known_as_such_says_where_it_stands_and_is_killed(start: Start) -> None:
    worker = start(rank_bodies.hang)
    pid = waiting_pid(worker)
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: worker.report(0.0).stopped)
    assert "in a_function_that_hangs" in worker.stack()
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: worker.report(0.0).stopped)
    worker.kill()
    assert ending(worker) == Died(signal=9, exit_code=None)
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_a_process_to_stop(start: Start, number: signal.Signals) -> None:
    worker = start(rank_bodies.wait_to_be_asked)
    os.kill(waiting_pid(worker), number)
    assert ending(worker) == Finished("was asked")


def test_the_worker_asks_a_process_to_stop(start: Start) -> None:
    worker = start(rank_bodies.wait_to_be_asked)
    assert worker.report(0.05).ending is None
    worker.ask_to_stop()
    assert ending(worker) == Finished("was asked")


def test_nothing_happens_to_a_process_that_has_ended(start: Start, log: Path) -> None:
    worker = start(rank_bodies.process_and_parent)
    finished = ending(worker)
    worker.ask_to_stop()
    worker.kill()
    assert worker.stack() == ""
    assert worker.report(0.0).ending == finished


def test_a_process_that_nobody_waits_for_makes_room_for_the_next(start: Start) -> None:
    pid = waiting_pid(start(rank_bodies.hang))
    worker = start(rank_bodies.process_and_parent)
    assert ending(worker).result[0] != pid
    assert not psutil.pid_exists(pid)


def test_what_a_process_leaves_behind_does_not_hide_its_end(start: Start) -> None:
    report, notes = heard(start(rank_bodies.leave_a_child_behind))
    child = psutil.Process(notes[0]["pid"])
    assert child.is_running()
    child.kill()
    assert report.ending == Died(signal=None, exit_code=4)


def test_a_body_that_cannot_be_imported_there_is_an_error(
    start: Start, pair: list[Worker], log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("def body(assignment, link): ...")
    monkeypatch.syspath_prepend(tmp_path)
    from only_here import body  # noqa: PLC0415 # pyrefly: ignore[missing-import]

    assert pair[0].start(job(body, None, log)) is None
    assert ending(pair[0]).message == "ModuleNotFoundError: No module named 'only_here'"


def test_a_log_that_cannot_be_written_is_an_error(pair: list[Worker], tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    assert pair[0].start(job(rank_bodies.say_and_return, None, tmp_path / "logs" / "rank-0.log")) is None
    assert ending(pair[0]).message.startswith("FileExistsError")


def test_memory_does_not_grow_with_every_shape_that_is_multiplied(start: Start) -> None:
    grown = ending(start(rank_bodies.multiply_many_shapes, 600)).result
    # Measured: 67 MiB, and 389 where torch keeps what it likes.
    assert grown < 150 << 20


def test_the_forkserver_takes_its_process_with_it_and_is_replaced(start: Start) -> None:
    worker = start(rank_bodies.hang)
    pid = waiting_pid(worker)
    parent = psutil.Process(pid).parent()
    assert parent is not None
    parent.kill()
    assert ending(worker) == Died(signal=9, exit_code=None)
    wait_until(lambda: is_gone(pid))
    assert ending(start(rank_bodies.process_and_parent)).result[1] != parent.pid


def test_an_import_that_fails_shows_its_traceback_and_is_tried_again(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "not_whole.py"
    module.write_text("import nothing_of_that_name")
    monkeypatch.syspath_prepend(tmp_path)
    worker = Worker((*PRELOADED, "not_whole"))
    with pytest.raises(RuntimeError, match="ended with 1:") as raised:
        worker.start(job(rank_bodies.process_and_parent, None, log))
    assert "Traceback (most recent call last)" in str(raised.value)
    assert "No module named 'nothing_of_that_name'" in str(raised.value)
    module.write_text("")
    worker.start(job(rank_bodies.process_and_parent, None, log))
    assert isinstance(ending(worker), Finished)


@pytest.mark.slow
def test_a_forkserver_that_uses_the_gpu_becomes_the_rank_itself(log: Path) -> None:
    worker = Worker((*PRELOADED, "tests.unit.cluster.gpu_in_use"))
    pids = []
    for _ in range(2):
        worker.start(job(rank_bodies.process_and_parent, None, log))
        pid, parent = ending(worker).result
        assert parent == os.getpid()
        pids.append(pid)
    assert pids[0] != pids[1]


@pytest.mark.parametrize("stopped", ["nobody", "the rank", "the forkserver"])
def test_when_the_process_that_holds_the_worker_dies_nothing_is_left(log: Path, stopped: str) -> None:
    command = [sys.executable, "-m", "tests.unit.cluster.holder", str(log)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        rank = psutil.Process(int(holder.stdout.readline()))
        forkserver = rank.parent()
        assert forkserver is not None
        assert forkserver.ppid() == holder.pid
        # A stopped process does nothing, whatever it is told.
        match stopped:
            case "the rank":
                rank.suspend()
            case "the forkserver":
                forkserver.suspend()
        holder.kill()
        wait_until(lambda: is_gone(rank.pid), seconds=10)
        if stopped == "the forkserver":
            forkserver.resume()
        wait_until(lambda: is_gone(forkserver.pid), seconds=10)
