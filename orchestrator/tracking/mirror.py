"""wandb as a mirror of the metrics: it gets the same numbers, and nothing depends on it.

Whatever goes wrong there is one warning, and training goes on.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.schema.execution import NoTracking, Tracking, WandbTracking
from orchestrator.tracking.run_description import RunDescription

if TYPE_CHECKING:
    import wandb

_logger = logging.getLogger(__name__)


class Mirror(Protocol):
    """Is told the numbers that also go to the metrics file."""

    def log(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """`step` is ours, the number of optimizer updates so far; values that are None are left out."""

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        """Ends the run and wandb's service; what was logged is then on disk. To be called when training fails, too."""


def start_mirror(tracking: Tracking, run: RunDescription) -> Mirror:
    """Starts the run in wandb; a mirror that does nothing where none is wanted or wandb fails. One rank calls this.

    WANDB_MODE in the environment (online, offline, disabled) wins over the recipe. Nobody is asked to log in.
    """
    if isinstance(tracking, NoTracking) or os.environ.get("WANDB_MODE") == "disabled":
        return _NoMirror()
    return _WandbMirror(tracking, run)


class _NoMirror:
    def log(self, step: int, values: Mapping[str, float | int | None]) -> None:
        pass

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        pass


class _WandbMirror:
    def __init__(self, tracking: WandbTracking, description: RunDescription) -> None:
        self._run: wandb.Run | None = None
        self._has_failed = False
        with self._tolerated("did not start"):
            # Half a second to import, and of no use to the other ranks.
            from orchestrator.tracking.wandb_run import start_run  # noqa: PLC0415

            self._run = start_run(tracking, description)

    def log(self, step: int, values: Mapping[str, float | int | None]) -> None:
        if self._run is None or self._has_failed:
            return
        with self._tolerated(f"stopped at step {step}"):
            self._run.log({name: value for name, value in values.items() if value is not None} | {"step": step})

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        with self._tolerated("did not finish"):
            from orchestrator.tracking.wandb_run import finish_run  # noqa: PLC0415

            finish_run(self._run, summary, exit_code)

    @contextmanager
    def _tolerated(self, failure: str) -> Iterator[None]:
        try:
            yield
        # What wandb 0.31 raises has no common root. Measured: its Error (no server, malformed key), ConnectionResetError
        # (service killed), ValidationError (a bad WANDB_MODE), MailboxClosedError and ServerResponseError, both internal.
        except Exception as error:  # noqa: BLE001
            if not self._has_failed:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                _logger.warning("wandb %s (%s); training goes on, and its numbers are in the metrics file", failure, reason)
            self._has_failed = True
