"""Who looks on while a stage runs."""

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.tracking.ledger import Ledger


@dataclass(frozen=True)
class Overseer:
    """Who is told what happens, and who may say that it is over."""

    ledger: Ledger
    say: Callable[[str], None]
    check: Callable[[], None]
    """Raises when the stage is no longer ours to run; asked several times a second."""
