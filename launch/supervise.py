"""A small process that outlives the command it watches over, and starts it again when it was killed."""

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

MAY_PASS = 75
"""The exit code of a command whose failure may go away by itself (EX_TEMPFAIL)."""
OUR_MISTAKE = 70
"""The exit code of an error that nobody foresaw (EX_SOFTWARE)."""
_ENDED_BY_RAY = 1
_DIE_WITH_PARENT = 1
_LONGEST_PAUSE_SECONDS = 60.0
_LONG_SECONDS = 600.0
"""A command that ran for so long has got somewhere; failures before it count no more."""


def supervise(words: Sequence[str], max_failures: int) -> int:
    """Runs the command until it ends by itself, and gives its exit code; `max_failures` in a row are the most."""
    failures = 0
    while True:
        started = time.monotonic()
        code = _run(words)
        if code >= 0 and code not in (MAY_PASS, _ENDED_BY_RAY):
            return code
        failures = 1 if time.monotonic() - started > _LONG_SECONDS else failures + 1
        how = f"was killed by signal {-code}" if code < 0 else "failed"
        if failures > max_failures:
            print(f"the command {how}, failure {failures} in a row; giving up", file=sys.stderr, flush=True)
            return code if code >= 0 else 128 - code
        print(f"the command {how}; starting it again", file=sys.stderr, flush=True)
        if code >= 0:
            time.sleep(min(_LONGEST_PAUSE_SECONDS, 2 ** (failures - 1)))


def _run(words: Sequence[str]) -> int:
    """In a session of its own, so that a signal to the terminal's processes reaches it once, from here."""
    command = [sys.executable, str(Path(__file__).with_name("run.py")), *words, "supervise=false"]
    watched = subprocess.Popen(command, start_new_session=True, preexec_fn=_end_with_parent)
    before = {
        number: signal.signal(number, lambda got, _: watched.send_signal(got)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        return watched.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """Asked to stop when this process is killed, the command saves and leaves rather than go on unseen."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)
