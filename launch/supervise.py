"""A small process that outlives the command it watches over, and starts it again when it was killed."""

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

MAY_PASS = 75
"""The exit code of a command whose failure may go away by itself (EX_TEMPFAIL)."""
OUR_MISTAKE = 70
"""The exit code of an error that nobody foresaw (EX_SOFTWARE)."""
_ENDED_BY_RAY = 1
_DIE_WITH_PARENT = 1
_LONGEST_PAUSE_SECONDS = 60.0
_LONG_SECONDS = 600.0
"""A command that ran for so long has got somewhere; failures before it count no more."""


def supervise(command: Sequence[str], max_failures: int) -> int:
    """Runs a command until it ends by itself or was asked to stop, and gives its exit code.

    Gives up after more than `max_failures` in a row.
    """
    failures = 0
    while True:
        started = time.monotonic()
        code, was_asked_to_stop = _run(command)
        if was_asked_to_stop or (code >= 0 and code not in (MAY_PASS, _ENDED_BY_RAY)):
            return _exit_code(code)
        failures = 1 if time.monotonic() - started > _LONG_SECONDS else failures + 1
        how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
        if failures > max_failures:
            print(f"the command {how}, failure {failures} in a row; giving up", file=sys.stderr, flush=True)
            return _exit_code(code)
        print(f"the command {how}; starting it again", file=sys.stderr, flush=True)
        if code >= 0:
            time.sleep(min(_LONGEST_PAUSE_SECONDS, 2 ** (failures - 1)))


def _run(command: Sequence[str]) -> tuple[int, bool]:
    """The exit code, and whether a signal that should stop the command came and was passed on to it.

    It runs in a session of its own, so that a signal to the terminal's processes reaches it once, from here.
    """
    watched = subprocess.Popen(command, start_new_session=True, preexec_fn=_end_with_parent)
    passed_on: list[int] = []

    def pass_on(number: int, _: object) -> None:
        passed_on.append(number)
        watched.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return watched.wait(), bool(passed_on)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(code: int) -> int:
    """As a shell gives it: above 128 for a command that was killed by a signal."""
    return code if code >= 0 else 128 - code


def _end_with_parent() -> None:
    """Asked to stop when this process is killed, the command saves and leaves rather than go on unseen."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)
