"""How far the preparation of data is, in a line."""

import time
from collections.abc import Callable
from typing import Protocol

from orchestrator.report.words import duration

_BAR = 24
"""Characters."""


class Prepared(Protocol):
    """What is told of a preparation."""

    @property
    def bytes(self) -> int: ...

    @property
    def total_bytes(self) -> int: ...

    @property
    def documents(self) -> int: ...

    @property
    def tokens(self) -> int: ...


class PreparingLine:
    """Each call looks again. The pace is what has been done since the first look, for a run may go on from another's."""

    def __init__(self, look: Callable[[], Prepared | None]) -> None:
        self._look = look
        self._first: tuple[float, int, int] | None = None

    def __call__(self) -> str | None:
        """None as long as nothing is done."""
        found = self._look()
        if found is None or not found.total_bytes:
            return None
        share = found.bytes / found.total_bytes
        bar = "━" * round(share * _BAR)
        return f"{bar:╌<{_BAR}} {share:4.0%}  {found.documents:,} documents, {found.tokens:,} tokens{self._pace(found)}"

    def _pace(self, found: Prepared) -> str:
        now = time.monotonic()
        if self._first is None:
            self._first = now, found.bytes, found.tokens
        began, before, tokens_before = self._first
        seconds, done = now - began, found.bytes - before
        if not done or not seconds:
            return ""
        left = (found.total_bytes - found.bytes) / done * seconds
        return f"  {(found.tokens - tokens_before) / seconds:,.0f} tokens/s  {duration(left)} left"
