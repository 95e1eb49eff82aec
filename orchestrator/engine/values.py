"""What goes into the engine and what comes out of it: plain values, of which the loop and its hooks are told."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from orchestrator.model.tensor_stream import TensorStream
from orchestrator.schema import OptimizerKind

PARTS = ("master", "exp_avg", "exp_avg_sq")
"""What steps change of a parameter: its fp32 master and Adam's two moments."""


@dataclass(frozen=True)
class EngineSettings:
    """How to compute, and the optimizer's constants."""

    zero: Literal[0, 1, 2, 3]
    precision: Literal["bf16", "fp16", "fp32"]
    micro_batch_size: int
    accumulation: int
    """Micro-batches of each rank per step."""
    weight_decay: float
    max_gradient_norm: float
    seed: int = 0
    """Of dropout."""
    optimizer: OptimizerKind = "adamw"
    faster: Mapping[str, float] = field(default_factory=dict)
    """How many times the learning rate of the others some parameters have, by name."""


@dataclass(frozen=True)
class Wishes:
    """What a rank asks for. What any of them asks for, all get, at the same step."""

    stop: bool = False
    save: bool = False


NO_WISHES = Wishes()


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step was."""

    loss: float
    """Mean over the targets of the global batch, in nats."""
    gradient_norm: float
    """Before clipping."""
    learning_rate: float
    num_tokens: int
    num_targets: int
    skipped: bool = False
    """fp16 only: the gradients overflowed and nothing was updated."""
    gradient_norms: dict[str, float] = field(default_factory=dict)
    """Of each trainable parameter, when the step was inspected."""
    scale_is_spent: bool = False
    """fp16 only: skipped although the loss scale was at its minimum."""
    wishes: Wishes = NO_WISHES
    """Of all ranks."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What this rank spent on reading, forward, backward (with the exchange of gradients) and optimizer."""

    @property
    def is_bad(self) -> bool:
        """Whether numbers went wrong, beyond the overflows that fp16 adjusts its scale by."""
        norm_is_bad = not self.skipped and not math.isfinite(self.gradient_norm)
        return not math.isfinite(self.loss) or norm_is_bad or self.scale_is_spent


@dataclass(frozen=True)
class EngineState:
    """All that steps change, whatever the number of ranks and the ZeRO level.

    Weights in the run's precision are not in it, being the rounded masters; nor is anything random, which the step's
    number gives.
    """

    tensors: dict[str, Tensor]
    """fp32, on CPU, whole, by f"{part}.{parameter's name}"."""
    numbers: dict[str, int | float]
    """`updates` as Adam counts them, and in fp16 what the loss scale depends on."""


@dataclass(frozen=True)
class StateStream:
    """An EngineState on its way out of the engine, which must not take a step before the tensors are read to their end."""

    tensors: TensorStream
    numbers: dict[str, int | float]

    def whole(self) -> EngineState:
        return EngineState(self.tensors.whole(), self.numbers)
