"""A LLaMA-family model in numbers, from its configuration alone, and how many of them a stage trains."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.contents import json_object
from orchestrator.plan.adaptation import Adaptation
from orchestrator.plan.targets import ends_in
from orchestrator.schema import PrefixTuning, RandomBase

_IN_BLOCK = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PUBLISHED: dict[str, tuple[int, int, int, int]] = {
    "huggyllama/llama-7b": (4096, 11008, 32, 32),
    "huggyllama/llama-13b": (5120, 13824, 40, 40),
    "huggyllama/llama-30b": (6656, 17920, 60, 52),
    "huggyllama/llama-65b": (8192, 22016, 80, 64),
}
"""Hidden size, width of the MLP, blocks and heads of the models that recipes name, for a machine that has them not."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the matrices."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    rows: int
    """Of embedding and head."""
    tied: bool = False
    attention_biases: bool = False
    mlp_biases: bool = False

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each linear layer of a block."""
        wide, narrow = self.heads * self.head_size, self.kv_heads * self.head_size
        shapes = ((wide, self.hidden), (narrow, self.hidden), (narrow, self.hidden), (self.hidden, wide))
        mlp = ((self.intermediate, self.hidden), (self.intermediate, self.hidden), (self.hidden, self.intermediate))
        return dict(zip(_IN_BLOCK, (*shapes, *mlp), strict=True))

    @property
    def body(self) -> int:
        """Weights of the blocks' linear layers."""
        return self.layers * sum(outputs * inputs for outputs, inputs in self.linear.values())

    @property
    def table(self) -> int:
        """Weights of the embedding, and of a head of its own."""
        return self.rows * self.hidden

    @property
    def biases(self) -> int:
        names = (_IN_BLOCK[:4] if self.attention_biases else ()) + (_IN_BLOCK[4:] if self.mlp_biases else ())
        return self.layers * sum(self.linear[name][0] for name in names)

    @property
    def parameters(self) -> int:
        norms = (2 * self.layers + 1) * self.hidden
        return self.body + self.biases + norms + self.table * (1 if self.tied else 2)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Full names of the linear layers in the blocks."""
        parts = {name: "self_attn" if name in _IN_BLOCK[:4] else "mlp" for name in _IN_BLOCK}
        return tuple(f"model.layers.{number}.{parts[name]}.{name}" for number in range(self.layers) for name in _IN_BLOCK)

    def with_rows(self, rows: int) -> "ModelShape":
        """As a vocabulary stage leaves it: with a head of its own."""
        return replace(self, rows=rows, tied=False)


@dataclass(frozen=True)
class Learned:
    """How many parameters a stage trains, and how many stand beside the base."""

    trainable: int
    added: int
    in_blocks: int
    """Of those that are trained, the ones in linear layers of the blocks or beside them."""
    head: bool
    """Whether the head learns."""
    whole: int
    """Of those that are trained, the ones of embedding and head as a whole, and of the largest matrix where all learn."""


def shape_of(base: Path | RandomBase | str) -> ModelShape | None:
    """Of a model's folder, a random one, or a hub id of which the sizes are known; None where they are not."""
    if isinstance(base, RandomBase):
        head = base.hidden_size // base.num_heads
        sizes = (base.hidden_size, base.intermediate_size, base.num_layers, base.num_heads, base.num_key_value_heads)
        return ModelShape(*sizes, head, base.pieces, base.tie_word_embeddings)
    if isinstance(base, Path):
        return _configured(json_object(base / "config.json"))
    if base not in _PUBLISHED:
        return None
    hidden, intermediate, layers, heads = _PUBLISHED[base]
    return ModelShape(hidden, intermediate, layers, heads, heads, hidden // heads, 32_000)


def learned(shape: ModelShape, adaptation: Adaptation, new_rows: int) -> Learned:
    """What the stage of an adaptation trains, of a model that has `new_rows` of added tokens."""
    if adaptation.subspace:
        return Learned(adaptation.subspace.dimension, adaptation.subspace.dimension, shape.body, True, 2 * shape.table)
    if adaptation.full:
        return Learned(shape.parameters, 0, shape.body, True, 2 * shape.table)
    factors = {name: _factors(shape, name, each.rank, adaptation.dora) for name, each in adaptation.lora.items()}
    trained = sum(factors[name] for name in adaptation.trained_lora)
    scales = sum(_scales(shape, name, adaptation) for name in adaptation.ia3)
    beside = _beside(shape, adaptation)
    tables = [shape.table for _ in adaptation.trained_modules] + [new_rows * shape.hidden for _ in adaptation.trained_rows]
    in_blocks = trained + beside + (scales if adaptation.trains_ia3 else 0)
    biases = shape.biases if adaptation.trained_bias != "none" else 0
    return Learned(
        trainable=in_blocks + sum(tables) + biases,
        added=sum(factors.values()) + scales + beside,
        in_blocks=in_blocks,
        head="lm_head" in (*adaptation.trained_modules, *adaptation.trained_rows, *adaptation.trained_lora),
        whole=sum(tables),
    )


def _factors(shape: ModelShape, name: str, rank: int, dora: bool) -> int:
    """Of all layers of a last name, or of the one of a full name."""
    last = name.rsplit(".", 1)[-1]
    if last not in shape.linear:
        return rank * (shape.rows + shape.hidden)
    outputs, inputs = shape.linear[last]
    number = sum(ends_in(layer, name) for layer in shape.layer_names)
    return number * (rank * (outputs + inputs) + (outputs if dora else 0))


def _scales(shape: ModelShape, name: str, adaptation: Adaptation) -> int:
    outputs, inputs = shape.linear[name]
    return shape.layers * (inputs if name in adaptation.ia3_feedforward else outputs)


def _beside(shape: ModelShape, adaptation: Adaptation) -> int:
    """Of virtual tokens or bottlenecks; an encoder of virtual tokens is small, and left out."""
    if bottleneck := adaptation.bottleneck:
        each = 2 * shape.hidden * bottleneck.size + shape.hidden + bottleneck.size
        return shape.layers * each * (2 if bottleneck.placement == "houlsby" else 1)
    prompt = adaptation.prompt
    if prompt is None:
        return 0
    width = 2 * shape.layers * shape.kv_heads * shape.head_size if isinstance(prompt, PrefixTuning) else shape.hidden
    return prompt.virtual_tokens * width


def _configured(config: dict[str, Any]) -> ModelShape:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    return ModelShape(
        hidden=hidden,
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or hidden // heads,
        rows=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings")),
        # Qwen2 has them without a word in its configuration.
        attention_biases=bool(config.get("attention_bias")) or config.get("model_type") == "qwen2",
        mlp_biases=bool(config.get("mlp_bias")),
    )
