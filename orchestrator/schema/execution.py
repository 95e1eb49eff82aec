"""Where a recipe runs, what happens when something fails there, and who is told. None of it changes what is learned."""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from orchestrator.schema.strict import Schema


class LocalCluster(Schema):
    """Ray, started on this machine for the length of the command."""

    kind: Literal["local"]
    gpus: NonNegativeInt | None = None
    """GPUs to use; all there are by default."""
    cpus_per_worker: PositiveInt = 1
    """At the least; workers share evenly what there is."""


class AddressCluster(Schema):
    """A Ray cluster that is already running."""

    kind: Literal["address"]
    address: str
    """auto or host:port, as `ray start` printed it."""
    cpus_per_worker: PositiveInt = 1


Cluster = Annotated[LocalCluster | AddressCluster, Field(discriminator="kind")]


class WorkerRange(Schema):
    """Written `2-8`: as many workers as the cluster gives at the time, between these."""

    fewest: PositiveInt
    most: PositiveInt


def _as_workers(value: object) -> object:
    match = re.fullmatch(r"\s*([1-9]\d*)\s*-\s*([1-9]\d*)\s*", value) if isinstance(value, str) else None
    if match and int(match[1]) <= int(match[2]):
        return {"fewest": int(match[1]), "most": int(match[2])}
    is_number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    # A recipe that was written out holds a range as a mapping.
    if is_number or isinstance(value, dict | WorkerRange):
        return value
    raise ValueError(f"input should be a number above 0, or a range of two such as 2-8, not {value!r}")


Workers = Annotated[int | WorkerRange, BeforeValidator(_as_workers)]


class CheckpointPolicy(Schema):
    """When a stage's training state is saved, so that it can go on from there."""

    every_steps: PositiveInt | None = 50
    every_minutes: PositiveFloat | None = 10
    """Whichever of the two comes first; null turns one off. A run that is asked to stop saves in any case."""
    keep: PositiveInt = 2
    """Generations that stay: should the newest turn out damaged, there is the one before."""
    max_failures: PositiveInt = 3
    """So many saves in a row may fail while training goes on; then it stops."""


class Recovery(Schema):
    """What a stage survives."""

    max_failures: NonNegativeInt = 5
    """Failures of workers, nodes or the network in a row, without a new checkpoint between them."""
    hang_seconds: PositiveFloat = 600
    """Without any progress for so long, the workers are taken to hang and start again. Give more than the model takes
    to load."""
    bad_steps: PositiveInt = 3
    """Steps in a row whose loss is NaN or infinite, before training stops."""
    wait_minutes: PositiveFloat = 60
    """How long to wait for nodes when those that are left are too few."""


class WandbTracking(Schema):
    """Mirrors the metrics to Weights & Biases."""

    kind: Literal["wandb"]
    project: str = "orchestrator"
    mode: Literal["auto", "online", "offline"] = "auto"
    """auto is online with a login, offline without one."""


class NoTracking(Schema):
    """Metrics stay in the stage's folder."""

    kind: Literal["none"]


Tracking = Annotated[WandbTracking | NoTracking, Field(discriminator="kind")]
