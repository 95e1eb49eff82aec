"""What a training process hears from whoever started it, and tells them; the loop knows no more of the cluster than this."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

Phase = Literal["starting", "loading", "between steps", "evaluating", "saving", "reading its batch", "computing"]
"""What a rank does once so many steps are done, in its order; it evaluates before the first and after the last."""
PHASES: tuple[str, ...] = get_args(Phase)


class Link(Protocol):
    """Of one rank."""

    def beat(self, step: int, phase: Phase) -> None:
        """So many steps are done, and a phase begins. Without a beat for long, the process is taken to hang."""

    def note(self, event: Mapping[str, Any]) -> None:
        """Something a person would want to read in the ledger, by its `event`."""

    def should_stop(self) -> bool:
        """Whether this rank was asked to finish its step, save and leave."""
