"""The heartbeat of a rank: what it tells goes out, what it is asked comes in, and it asks for a save by the clock."""

import time
from collections.abc import Mapping
from typing import Any

from orchestrator.engine import Wishes
from orchestrator.train.link import Phase
from orchestrator.train.pulse import LinkedPulse

EVERY_SECONDS = 0.05


class Line:
    """The other end of a link: keeps what was told, and asks to stop when told so."""

    def __init__(self) -> None:
        self.beats: list[tuple[int, Phase]] = []
        self.is_asked = False

    def beat(self, step: int, phase: Phase) -> None:
        self.beats.append((step, phase))

    def note(self, event: Mapping[str, Any]) -> None:
        raise AssertionError("a pulse tells nothing but beats")

    def should_stop(self) -> bool:
        return self.is_asked


def test_beats_go_out() -> None:
    line = Line()
    pulse = LinkedPulse(line, None)
    pulse.beat(3, "reading its batch")
    pulse.beat(3, "computing")
    assert line.beats == [(3, "reading its batch"), (3, "computing")]


def test_who_is_asked_to_stop_wishes_so() -> None:
    line = Line()
    pulse = LinkedPulse(line, None)
    assert pulse.wishes() == Wishes(stop=False, save=False)
    line.is_asked = True
    assert pulse.wishes() == Wishes(stop=True, save=False)


def test_a_save_is_wished_for_once_whenever_the_time_has_come() -> None:
    began = time.monotonic()
    pulse = LinkedPulse(Line(), EVERY_SECONDS / 60)
    wished = []
    while len(wished) < 3:
        if pulse.wishes().save:
            wished.append(time.monotonic() - began)
        assert time.monotonic() - began < 10
    gaps = [later - earlier for earlier, later in zip([0.0, *wished], wished, strict=False)]
    assert min(gaps) > 0.9 * EVERY_SECONDS


def test_without_a_clock_no_save_is_wished_for() -> None:
    pulse = LinkedPulse(Line(), None)
    pulse.wishes()
    time.sleep(EVERY_SECONDS)
    assert not pulse.wishes().save
