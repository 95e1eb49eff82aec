"""Ctrl-C and SIGTERM as an ordinary event: the step is finished and saved; only a further Ctrl-C is not waited for."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Whether, and by what, this process was asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def is_asked(self) -> bool:
        return self.signal is not None

    def take(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        # Whoever ends a process in order may say so several times: a pod's last act does, and Ray's job server.
        self.signal = self.signal or signal.Signals(number)


@contextmanager
def listening() -> Iterator[Interrupts]:
    """Takes the signals of this process for the length of a `with`; to be called on the main thread."""
    interrupts = Interrupts()
    before = {number: signal.signal(number, interrupts.take) for number in SIGNALS}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
