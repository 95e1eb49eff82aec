"""A few steps of the engine on a tiny LLaMA and real rows, as the parity tests compare them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from orchestrator.data.batches import StepBatches
from orchestrator.data.order import SampleOrder
from orchestrator.data.rows import PreparedRows
from orchestrator.engine import Engine, EngineSettings
from orchestrator.model.adapters import attach
from orchestrator.model.loading import load_model
from orchestrator.model.loss import SummedLoss
from orchestrator.plan.adaptation import Adaptation
from orchestrator.plan.targets import LoraShape
from orchestrator.schema import OptimizerKind

STEPS = 6
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
MAX_GRADIENT_NORM = 0.7
"""Some steps are above it and clipped, some below."""

# A second stage: LoRA of its own, of two ranks, beside embedding, head and an earlier stage's frozen factors.
ADAPTATION = Adaptation(
    lora={"q_proj": LoraShape(4, 8), "v_proj": LoraShape(4, 8), "down_proj": LoraShape(8, 32)},
    modules_to_save=("embed_tokens", "lm_head"),
    trained_lora=("v_proj", "down_proj"),
    trained_modules=("embed_tokens", "lm_head"),
)

Precision = Literal["bf16", "fp16", "fp32"]
Curve = list[tuple[float, float]]
"""Loss and gradient norm of each step."""


@dataclass(frozen=True)
class TinyRun:
    """What is learned, and how it is computed."""

    base: Path
    rows: Path
    precision: Precision
    global_batch_size: int = 8
    micro_batch_size: int = 2
    zero: Literal[0, 1, 2, 3] = 2
    dropout: float = 0.0
    seed: int = 0
    """Of dropout."""
    optimizer: OptimizerKind = "adamw"

    def batches(self, rank: int, num_workers: int) -> StepBatches:
        rows = PreparedRows.open(self.rows)
        order = SampleOrder(len(rows), self.global_batch_size, seed=5)
        return StepBatches(rows, order, self.micro_batch_size, rank, num_workers)


def tiny_model(base: Path, precision: Precision, dropout: float = 0.0) -> PreTrainedModel:
    """The same start for everyone, with an earlier stage's factors that are no longer zero."""
    model = load_model(base, precision)
    attach(model, replace(ADAPTATION, dropout=dropout), seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and not parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def tiny_engine(run: TinyRun) -> Engine:
    """The engine of a run, before its first step; all ranks call it."""
    settings = EngineSettings(
        zero=run.zero,
        precision=run.precision,
        micro_batch_size=run.micro_batch_size,
        accumulation=run.global_batch_size // (run.micro_batch_size * dist.get_world_size()),
        weight_decay=WEIGHT_DECAY,
        max_gradient_norm=MAX_GRADIENT_NORM,
        seed=run.seed,
        optimizer=run.optimizer,
    )
    return Engine(SummedLoss(tiny_model(run.base, run.precision, run.dropout)), settings)


def take_steps(engine: Engine, run: TinyRun, first: int, last: int) -> Curve:
    """Loss and gradient norm of each step from `first` to before `last`; all ranks call it."""
    batches = run.batches(dist.get_rank(), dist.get_world_size())
    results = [engine.step(batches.of_step(step), LEARNING_RATE, step, inspect=step < 2) for step in range(first, last)]
    return [(result.loss, result.gradient_norm) for result in results]


def engine_curves(runs: Sequence[TinyRun]) -> list[Curve]:
    """Loss and gradient norm of each step of each run; all ranks call it."""
    return [take_steps(tiny_engine(run), run, 0, STEPS) for run in runs]
