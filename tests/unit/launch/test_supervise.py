"""The supervisor with commands that end in every way: what is started again, what is not, and who is told to stop."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from launch.supervise import supervise
from tests.shared_data import ROOT

KILLED, MAY_PASS, MISTAKE = "os.kill(os.getpid(), 9)", "sys.exit(75)", "sys.exit(2)"
WAIT = """
signal.signal(signal.SIGTERM, lambda *_: told("SIGTERM"))
signal.signal(signal.SIGINT, lambda *_: told("SIGINT"))
told("ready")
while tellings("SIGTERM") + tellings("SIGINT") == 0:
    time.sleep(0.01)
time.sleep(0.2)
"""
"""Until it is asked to stop, and a little longer."""


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """A line for each thing that commands do."""
    return tmp_path / "told"


def command(told: Path, *ways: str) -> list[str]:
    """Ends the first time in the first of these ways, then in the next, and in the last one ever after."""
    code = f"""
import os, signal, sys, time
def told(word):
    with open({str(told)!r}, "a") as file:
        file.write(word + "\\n")
def tellings(word):
    return open({str(told)!r}).read().split().count(word)
told("start")
exec({ways!r}[min(tellings("start"), {len(ways)}) - 1])
"""
    return [sys.executable, "-c", code]


def words(told: Path) -> list[str]:
    return told.read_text().split() if told.exists() else []


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@contextmanager
def supervising(watched: Sequence[str], max_failures: int = 3) -> Iterator[subprocess.Popen[str]]:
    """The supervisor in a process of its own, which signals can be sent to."""
    code = f"import sys; from launch.supervise import supervise; sys.exit(supervise({list(watched)!r}, {max_failures}))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("way", "code"), [("pass", 0), (MISTAKE, 2), ("sys.exit(70)", 70), ("sys.exit(143)", 143)])
def test_a_command_that_ends_by_itself_is_not_started_again(told: Path, way: str, code: int) -> None:
    assert supervise(command(told, way), max_failures=3) == code
    assert words(told) == ["start"]


def test_a_killed_command_is_started_again(told: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert supervise(command(told, KILLED, KILLED, "pass"), max_failures=3) == 0
    assert words(told) == ["start"] * 3
    assert capfd.readouterr().err.count("the command was killed by signal 9; starting it again\n") == 2


def test_a_failure_that_may_pass_is_tried_again_after_a_pause(told: Path, capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert supervise(command(told, MAY_PASS, MISTAKE), max_failures=3) == 2
    assert time.monotonic() - began > 1
    assert words(told) == ["start"] * 2
    assert "the command failed with exit code 75; starting it again\n" in capfd.readouterr().err


def test_a_command_that_lost_its_ray_is_started_again(told: Path) -> None:
    assert supervise(command(told, "sys.exit(1)", "pass"), max_failures=3) == 0
    assert words(told) == ["start"] * 2


@pytest.mark.parametrize(("way", "code"), [(KILLED, 128 + 9), (MAY_PASS, 75)])
def test_after_too_many_failures_it_gives_up(told: Path, capfd: pytest.CaptureFixture[str], way: str, code: int) -> None:
    assert supervise(command(told, KILLED, way), max_failures=1) == code
    assert words(told) == ["start"] * 2
    assert capfd.readouterr().err.endswith(", failure 2 in a row; giving up\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_once_and_the_command_is_waited_for(told: Path, number: signal.Signals) -> None:
    with supervising(command(told, WAIT + "sys.exit(128 + 15)")) as process:
        wait_until(lambda: "ready" in words(told))
        process.send_signal(number)
        assert process.wait(30) == 128 + 15
    assert words(told) == ["start", "ready", number.name]


@pytest.mark.parametrize(("way", "code"), [(KILLED, 128 + 9), (MAY_PASS, 75)])
def test_a_command_that_was_asked_to_stop_is_not_started_again_however_it_ends(told: Path, way: str, code: int) -> None:
    with supervising(command(told, WAIT + way)) as process:
        wait_until(lambda: "ready" in words(told))
        process.terminate()
        assert process.wait(30) == code
        assert process.stderr
        assert process.stderr.read() == ""
    assert words(told) == ["start", "ready", "SIGTERM"]


def test_a_signal_that_kills_the_command_ends_the_supervisor_too(told: Path) -> None:
    with supervising(command(told, "told('ready'); time.sleep(60)")) as process:
        wait_until(lambda: "ready" in words(told))
        process.terminate()
        assert process.wait(30) == 128 + 15
    assert words(told) == ["start", "ready"]


def test_ctrl_c_in_the_terminal_reaches_the_command_through_the_supervisor_alone(told: Path) -> None:
    with supervising(command(told, WAIT)) as process:
        wait_until(lambda: "ready" in words(told))
        (watched,) = psutil.Process(process.pid).children()
        assert os.getsid(watched.pid) == watched.pid
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def test_when_the_supervisor_is_killed_the_command_is_asked_to_stop(told: Path) -> None:
    with supervising(command(told, WAIT)) as process:
        wait_until(lambda: "ready" in words(told))
        process.kill()
        wait_until(lambda: "SIGTERM" in words(told))
    assert words(told) == ["start", "ready", "SIGTERM"]
