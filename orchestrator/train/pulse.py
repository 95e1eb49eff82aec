"""The heartbeat of a rank: what it does goes out over its link, and what it is asked comes in between two steps."""

import time

from orchestrator.engine import Wishes
from orchestrator.train.link import Link, Phase


class LinkedPulse:
    """Asks to save by the clock, too; one rank's clock is enough, since what one asks for all do."""

    def __init__(self, link: Link, save_every_minutes: float | None) -> None:
        self._link, self._every_minutes = link, save_every_minutes
        self._saved_at = time.monotonic()

    def beat(self, step: int, phase: Phase) -> None:
        self._link.beat(step, phase)

    def wishes(self) -> Wishes:
        is_due = self._every_minutes is not None and time.monotonic() - self._saved_at >= self._every_minutes * 60
        if is_due:
            self._saved_at = time.monotonic()
        return Wishes(stop=self._link.should_stop(), save=is_due)
