"""A whole recipe: the words a user types, and the stages by name, in order."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, Tag, model_validator

from orchestrator.schema.cluster import Cluster
from orchestrator.schema.execution import CheckpointPolicy, Evaluation, Recovery, Tracking, Workers
from orchestrator.schema.stages import Stage
from orchestrator.schema.strict import Schema, Sources, WeightedSources, mapping_or

StageSelection = int | str | tuple[int | str, ...]
"""What `stage=` takes: a number, a name, a range (1-3), a list of these, or all."""


class RandomBase(Schema):
    """A LLaMA of random weights with a tokenizer trained on the recipe's own sample: a base without a download."""

    kind: Literal["random"]
    text: Sources
    """What the base tokenizer is trained on."""
    pieces: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_key_value_heads: PositiveInt
    max_positions: PositiveInt
    tie_word_embeddings: bool = False

    @model_validator(mode="after")
    def _check(self) -> "RandomBase":
        for name, divisor in (("hidden_size", self.num_heads), ("num_heads", self.num_key_value_heads)):
            if getattr(self, name) % divisor:
                raise ValueError(f"{name} {getattr(self, name)} is not divisible by {divisor}")
        return self


class Retention(Schema):
    """What the model should still know afterwards: its loss on this text may rise by so much, not more."""

    text: Sources
    max_rise: NonNegativeFloat
    """Bits per character above the base model's."""


class HeldOutShare(Schema):
    """Documents of the recipe's `text` that are never learned and measure what is."""

    share: float = Field(gt=0, lt=1)
    """Which they are follows from what they say and from the seed, so a document's copies are held out with it. The
    vocabulary stage counts pieces in all of the text."""


Validation = Annotated[
    Annotated[HeldOutShare, Tag("HeldOutShare")] | Annotated[Sources, Tag("tuple[str, ...]")],
    mapping_or("HeldOutShare", "tuple[str, ...]"),
]


class Reading(Schema):
    """What is done about documents and instructions that may not be wanted."""

    bad_records: Literal["stop", "skip"] = "stop"
    """Those that cannot be read: stop before anything is learned, or leave them out and say how many."""
    deduplicate: bool = False
    """Learn equal documents of a stage once."""


class Comparison(Schema):
    """One stage, trained in several ways from the same start."""

    stage: str
    """The training stage that differs; the stages before it are shared, those after it are left out."""
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    """By name: what the stage says otherwise, such as `{method: full, learning_rate: 1e-4}`."""
    seeds: tuple[NonNegativeInt, ...] = Field(default=(1, 2, 3), min_length=1)
    reference: str | None = None
    """The method by whose gain over the base the others are measured."""
    reach: float = Field(default=0.9, gt=0, le=1)
    """Share of that gain: the table says which method reaches it with the fewest parameters. 0.9 gives Aghajanyan's d90."""
    latency_tokens: NonNegativeInt = 32
    """Tokens that are generated to measure what a method costs afterwards; 0 measures nothing."""

    @model_validator(mode="after")
    def _check(self) -> "Comparison":
        if self.reference is not None and self.reference not in self.methods:
            raise ValueError(f"reference: {self.reference!r} is none of the methods ({', '.join(self.methods)})")
        return self


def _plain_selection(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class Recipe(Schema):
    """How a base model is adapted, stage by stage, and with what."""

    name: str
    stage: Annotated[StageSelection, BeforeValidator(_plain_selection)] = "all"
    base_model: str | RandomBase
    """A folder in Hugging Face format, a hub id, or a random model to try things on."""
    text: WeightedSources = ()
    instructions: WeightedSources = ()
    validation: Validation = ()
    """Held-out text, or a share of `text` to hold out: bits per character before and after each training stage."""
    validation_instructions: Sources = ()
    """Held-out instructions: bits per character of their answers before and after each training stage."""
    retention: Retention | None = None
    reading: Reading = Reading()
    seed: NonNegativeInt = 1
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    stages: dict[str, Stage] = Field(min_length=1)
    compare: Comparison | None = None
    """Trains a stage in several ways, and makes a table of what came out, in place of the recipe itself."""

    workers: Workers | None = None
    """Training processes, one a device; as many as fit by default. A range such as 2-8 takes what there is at the time."""
    zero: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: what is partitioned over the workers (nothing, optimizer, + gradients, + parameters)."""
    run_root: str = "runs"
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    recovery: Recovery = Recovery()
    evaluation: Evaluation = Evaluation()
    preflight: Literal["first", "only"] = "first"
    """What can be found before anything trains is looked for first; `only` stops there."""
    ui: Literal["live", "plain"] = "live"
    """A view that changes as it trains, where there is a terminal, or plain lines."""
    license: str | None = None
    """Of what is exported, as Hugging Face writes it (apache-2.0); the base's own by default, where its folder says one."""
    supervise: bool = False
    """Watches over the command itself, and starts it again should it be killed."""
    cluster: Cluster
    tracking: Tracking
