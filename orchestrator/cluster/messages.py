"""What travels between a training process, the worker that holds it, and the driver. Plain values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import OrchestratorError
from orchestrator.train.link import Link, Phase


@dataclass(frozen=True)
class Place:
    """Where a rank stands among the others."""

    rank: int
    num_workers: int
    local_rank: int
    """Among the ranks of its node."""
    local_workers: int
    node_rank: int
    node: str
    """The node's address."""


@dataclass(frozen=True)
class Job:
    """What one rank is to do."""

    body: Callable[[Any, Link], Any]
    """Gets `assignment` and its link, with torch.distributed up; what it returns is pickled."""
    assignment: Any
    place: Place
    backend: Literal["nccl", "gloo"]
    meeting: tuple[str, int] | None
    """Host and port where the ranks find each other; rank 0 opens it and says where."""
    log: Path
    """Gets what the process prints."""
    visible_gpus: str | None
    """CUDA_VISIBLE_DEVICES: all GPUs of the node's ranks, so that they reach each other directly."""


@dataclass(frozen=True)
class Listening:
    """Rank 0 has opened the meeting place."""

    port: int


@dataclass(frozen=True)
class Beat:
    """There is progress."""

    step: int
    """Steps that are done."""
    phase: Phase


@dataclass(frozen=True)
class Note:
    """For the ledger."""

    event: Mapping[str, Any]


@dataclass(frozen=True)
class Finished:
    """The body returned."""

    result: Any


@dataclass(frozen=True)
class Raised:
    """The body raised an error."""

    kind: Literal["ours", "out_of_memory", "other"]
    message: str
    traceback: str
    error: OrchestratorError | None
    at: float
    """When, in seconds since the epoch: other ranks' errors may follow from it."""


@dataclass(frozen=True)
class Died:
    """The process ended without a word."""

    signal: int | None
    exit_code: int | None

    def __str__(self) -> str:
        if self.signal is None and self.exit_code is None:
            return "left, nobody knows how"
        return f"was killed by signal {self.signal}" if self.signal else f"exited with {self.exit_code}"


Ending = Finished | Raised | Died


@dataclass(frozen=True)
class Report:
    """What a worker knows of its process."""

    beat: Beat
    silent_seconds: float
    """Since the last beat."""
    notes: tuple[Mapping[str, Any], ...]
    """Since the last report."""
    ending: Ending | None
    stopped: bool
    """By a signal such as SIGSTOP; such a process says nothing and does nothing."""
