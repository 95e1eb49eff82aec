"""Who looks on while a stage runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from orchestrator.tracking.ledger import Ledger


@dataclass(frozen=True)
class Overseer:
    """Who is told what happens, and who may say that it is over."""

    ledger: Ledger
    say: Callable[[str], None]
    show_learning: Callable[[Mapping[str, tuple[int, int]]], None]
    """By kind of module how many parameters learn, and of how many; before the first step."""
    check: Callable[[], None]
    """Raises when the stage is no longer ours to run; asked several times a second."""
