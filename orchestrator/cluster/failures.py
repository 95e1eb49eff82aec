"""What went wrong, and what follows from it: errors as they were raised, and whether another try may help."""

import time
from dataclasses import dataclass, field
from typing import Literal

from ray.exceptions import RayTaskError

from orchestrator.errors import ClusterError, OrchestratorError

Cause = Literal["worker_lost", "node_lost", "hang", "out_of_memory", "error"]


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended before its stage did."""

    cause: Cause
    rank: int
    node: str
    """The node's address."""
    step: int
    """The last step that was done."""
    message: str
    detail: str = ""
    """A traceback or the stacks of a hanging process."""
    error: OrchestratorError | None = None
    """Ours, which names what the user should change: another try would end the same way."""
    at: float = field(default_factory=time.time)
    """When, in seconds since the epoch."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node} {self.message}"


def first_cause(failures: list[Failure]) -> Failure:
    """The failure that the others follow from: a rank that is lost or fails makes its neighbours' connections fail."""
    return min(failures, key=lambda failure: (failure.error is None, _RANKING.index(failure.cause), failure.at))


def explains(failures: list[Failure]) -> bool:
    """Whether one of them may be the first: an error of a rank may be no more than a connection that another one broke."""
    return any(failure.cause != "error" or failure.error for failure in failures)


_RANKING: tuple[Cause, ...] = ("out_of_memory", "node_lost", "worker_lost", "hang", "error")


def cause_of(error: BaseException) -> OrchestratorError:
    """Our own error as it was raised on the cluster; any other as a ClusterError that keeps the remote traceback."""
    return _ours(error) or ClusterError(str(error))


def _ours(error: BaseException | None) -> OrchestratorError | None:
    while error is not None:
        # Ray's own wrapper is also an instance of the class that it wraps, but its text is a whole traceback.
        if isinstance(error, OrchestratorError) and not isinstance(error, RayTaskError):
            return error
        inner = error.cause if isinstance(error, RayTaskError) else None
        error = inner or error.__cause__
    return None
