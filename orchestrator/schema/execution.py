"""Where a recipe runs and who is told. None of it changes what is learned."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

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
