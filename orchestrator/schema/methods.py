"""How the blocks of a model are adapted: the kinds of `method` that a training stage may have."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from orchestrator.schema.strict import Schema

ALL_LINEAR = "all-linear"
Names = Annotated[tuple[str, ...], Field(min_length=1)]


Init = Literal["kaiming", "gaussian", "pissa", "loftq"]
BEGINS_WITH_WEIGHTS: tuple[Init, ...] = ("pissa", "loftq")
"""Factors that are not zero together at first, and belong to a weight that is another than the base's."""


class Lora(Schema):
    """Low-rank adapters on linear layers (Hu et al. 2021): W x + (alpha / rank) B A x."""

    kind: Literal["lora"]
    targets: Names | str
    """Names of linear layers, such as q_proj: every block's layer of that name is adapted, and lm_head or embed_tokens where
    they are named. A word alone is a regular expression for whole names (`model.layers.3.mlp.up_proj`), and all-linear is
    every linear layer of the blocks."""
    rank: PositiveInt
    alpha: PositiveInt
    dropout: float = Field(default=0.0, ge=0, lt=1)
    layers_to_transform: tuple[NonNegativeInt, ...] | None = None
    """Numbers of the blocks that are adapted; all by default."""
    layers_pattern: str | None = None
    """What the blocks are called in a layer's name, where it has several numbers: `layers` in model.layers.3.mlp.up_proj."""
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    """Other ranks, by the end of a layer's name or a regular expression for it."""
    alpha_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases learn too: all of the model's, or those of the layers that are adapted."""
    rslora: bool = False
    """Scales by alpha / sqrt(rank) (Kalajdzievski 2023), so that a larger rank does not learn more slowly."""
    dora: bool = False
    """Learns the length of each of the weight's rows apart from its direction (Liu et al. 2024)."""
    init: Init = "kaiming"
    """How A and B begin: A at random and B zero, in two ways; with the largest singular vectors of the weight, which are
    taken out of it (pissa, Meng et al. 2024); or with those of what quantization took from it (loftq, Li et al. 2023, one
    step)."""
    learning_rate_ratio: PositiveFloat = 1.0
    """B learns so many times as fast as A (LoRA+, Hayou et al. 2024)."""

    @model_validator(mode="after")
    def _check(self) -> "Lora":
        if self.dora and self.init in BEGINS_WITH_WEIGHTS:
            raise ValueError(f"dora and init: {self.init} do not go together: both take the weight apart; choose one")
        return self


class FullFineTuning(Schema):
    """Every weight learns, and what is left is a whole model: the base of the stages that follow."""

    kind: Literal["full"]


class Subspace(Schema):
    """Every weight moves, but only within a random subspace (Li et al. 2018, Aghajanyan et al. 2021): a measure of how few
    numbers a task needs. What is left is a whole model."""

    kind: Literal["subspace"]
    dimension: PositiveInt
    """Numbers that learn."""
    structure_aware: bool = True
    """A scale for each block is among them (SAID); else one projection moves the whole model (DID)."""


class BitFit(Schema):
    """The biases learn, and nothing else (Ben Zaken et al. 2021)."""

    kind: Literal["bitfit"]


class Ia3(Schema):
    """What layers give or take is scaled, element by element (Liu et al. 2022)."""

    kind: Literal["ia3"]
    targets: Names = ("k_proj", "v_proj", "down_proj")
    """Linear layers of the blocks."""
    feedforward: tuple[str, ...] = ("down_proj",)
    """Those of them of which the input is scaled; of the others it is the output."""

    @model_validator(mode="after")
    def _check(self) -> "Ia3":
        if strangers := sorted(set(self.feedforward) - set(self.targets)):
            raise ValueError(f"feedforward: {strangers[0]} is none of the targets ({', '.join(self.targets)})")
        return self


class Bottleneck(Schema):
    """Small networks behind the parts of each block: x + up(relu(down(x)))."""

    kind: Literal["bottleneck"]
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """Behind attention and the MLP (Houlsby et al. 2019), or behind the MLP alone (Pfeiffer et al. 2021)."""
    size: PositiveInt = 64
    """Width of a network's middle."""


WholeModelMethod = FullFineTuning | Subspace
"""Those that leave a whole model."""


class PromptTuning(Schema):
    """Embeddings of virtual tokens before every sample (Lester et al. 2021); they begin as those of random pieces."""

    kind: Literal["prompt_tuning"]
    virtual_tokens: PositiveInt = 20


class PTuning(Schema):
    """The same, made by a small network that learns with them and is not needed afterwards (Liu et al. 2021)."""

    kind: Literal["p_tuning"]
    virtual_tokens: PositiveInt = 20
    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden_size: PositiveInt = 128
    layers: PositiveInt = 2
    """Of an LSTM; an MLP has three."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Between the layers of an LSTM."""


class PrefixTuning(Schema):
    """Keys and values of virtual tokens in every layer (Li and Liang 2021)."""

    kind: Literal["prefix_tuning"]
    virtual_tokens: PositiveInt = 20
    projection: PositiveInt | None = None
    """Width of a network that makes them while they learn, as in the paper; they learn by themselves without one."""


PromptMethod = PromptTuning | PTuning | PrefixTuning
"""Those that leave the model as it is, and tell it something first."""


class Quantization(Schema):
    """The linear layers of the blocks in fewer bits, by bitsandbytes (Dettmers et al. 2022, 2023); embedding, head and all
    that learns keep the run's precision. The base on disk stays what it is."""

    kind: Literal["nf4", "fp4", "int8"]
    double: bool = True
    """Quantizes the scales of nf4 and fp4 as well: 4.1 bits a weight in place of 4.5."""


def _by_name(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


QuantizationByName = Annotated[Quantization, BeforeValidator(_by_name)]
"""By its kind alone, such as `quantization: nf4`, or a mapping."""

Method = Annotated[
    Annotated[
        Lora | FullFineTuning | Subspace | BitFit | Ia3 | Bottleneck | PromptTuning | PTuning | PrefixTuning,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_by_name),
]
"""By its kind alone, such as `method: bitfit`, or a mapping with its hyperparameters."""
