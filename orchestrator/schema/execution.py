"""How many workers, what happens when something fails, and who is told. None of it changes what is learned."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from orchestrator.schema.cluster import Range, as_range
from orchestrator.schema.strict import Schema

Workers = Annotated[int | Range, BeforeValidator(as_range)]


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


class Evaluation(Schema):
    """What is measured while a stage trains; the held-out loss before and after it is measured in any case."""

    every_steps: PositiveInt | None = None
    """Held-out loss, and what the model makes of `prompts`; null does neither."""
    prompts: tuple[str, ...] = ("从前", "Once upon a time")
    """What the model goes on with, one likeliest token after another; a stage that learns answers gets them as
    instructions."""
    sample_tokens: NonNegativeInt = 32
    """Of each sample, at most."""


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
