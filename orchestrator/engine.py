"""The DeepSpeed engine: ZeRO 0 to 3 behind one step. DeepSpeed is spoken in this file only.

Trainable parameters compute in the run's precision and keep fp32 masters; frozen ones have no gradient and no optimizer
state. Losses are sums divided by the targets of the global batch, so accumulation and world size change nothing.
"""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

# On a machine without a GPU DeepSpeed would guess, and say so.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from orchestrator.data.batches import MicroBatch, StepBatch
from orchestrator.errors import TrainingError
from orchestrator.model.checksum import checksum

deepspeed_logger.setLevel(logging.ERROR)
deepspeed.utils.logger.setLevel(logging.ERROR)


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


class Engine:
    """A model whose forward gives a summed loss, spread over the ranks. All ranks must call each method together."""

    def __init__(self, model: nn.Module, settings: EngineSettings) -> None:
        self._settings = settings
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        on_gpu = torch.cuda.is_available()
        optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=settings.weight_decay, fused=on_gpu)
        # The engine's attributes come from many mixins, and its annotations say too little to check against.
        self._engine, *_ = cast(Any, deepspeed.initialize)(
            model=model, optimizer=optimizer, config=_config(settings, on_gpu), dist_init_required=False
        )
        # Without ZeRO, DeepSpeed makes the moments by a step on zero gradients. Adam counts it, and its first real update
        # comes out a quarter too small; without the state it starts at one, as in ZeRO 1 to 3.
        if settings.zero == 0:
            optimizer.state.clear()
        self._parameters = dict(self._engine.module.named_parameters())
        self._trainable = {name: parameter for name, parameter in self._parameters.items() if parameter.requires_grad}
        self._world = torch.distributed.get_world_size()

    @property
    def device(self) -> torch.device:
        return self._engine.device

    def step(self, batch: StepBatch, learning_rate: float, inspect: bool = False) -> StepResult:
        """One optimizer update over a global batch; `inspect` also measures each parameter's gradient."""
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros((), device=self.device)
        norms: dict[str, float] = {}
        plain_norm: float | None = None
        # DeepSpeed divides by accumulation and averages over ranks; both are undone, since the sum is already global.
        scale = self._world * self._settings.accumulation / batch.num_targets
        for number, micro in enumerate(batch.micro_batches):
            loss = self._engine(micro.input_ids.to(self.device), micro.labels.to(self.device))
            total += loss.detach()
            self._engine.backward(loss * scale)
            if number == len(batch.micro_batches) - 1:
                plain_norm = self._plain_gradient_norm()
                norms = self._gradient_norms() if inspect else {}
            self._engine.step()
        torch.distributed.all_reduce(total)
        return StepResult(
            loss=total.item() / batch.num_targets,
            gradient_norm=plain_norm if plain_norm is not None else self._global_gradient_norm(),
            learning_rate=learning_rate,
            num_tokens=batch.num_tokens,
            num_targets=batch.num_targets,
            skipped=self._settings.precision == "fp16" and bool(self._engine.optimizer.overflow),
            gradient_norms=norms,
        )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> float:
        """Summed loss over all ranks' micro-batches, in nats; every rank must bring as many."""
        self._engine.eval()
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for micro in batches:
            total += self._engine.module(micro.input_ids.to(self.device), micro.labels.to(self.device))
        torch.distributed.all_reduce(total)
        return total.item()

    def parameters(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The named parameters, whole, on CPU, in the precision the model computes with."""
        for name in names:
            parameter = self._parameters[name]
            # ZeRO-3 keeps a slice on each rank; gathering one at a time needs no room for the whole model.
            with GatheredParameters([parameter], enabled=self._settings.zero == 3):
                yield name, parameter.detach().cpu().clone()

    def frozen_checksums(self) -> dict[str, int]:
        """A checksum of each frozen parameter, or of this rank's part of it."""
        frozen = ((name, parameter) for name, parameter in self._parameters.items() if not parameter.requires_grad)
        return {name: checksum(getattr(parameter, "ds_tensor", parameter)) for name, parameter in frozen}

    def master_checksums(self) -> dict[str, int]:
        """A checksum of the fp32 master of each trainable parameter."""
        return {name: checksum(self._master(parameter)) for name, parameter in self._trainable.items()}

    def _master(self, parameter: nn.Parameter) -> Tensor:
        if self._settings.zero > 0:
            return cast(Tensor, safe_get_full_fp32_param(parameter))
        if self._settings.precision == "fp32":
            return parameter
        # Without partitioning DeepSpeed keeps masters in groups that mirror those of the half-precision weights.
        groups = zip(self._engine.optimizer.fp16_groups, self._engine.optimizer.fp32_groups, strict=True)
        return next(
            master for halves, masters in groups for half, master in zip(halves, masters, strict=True) if half is parameter
        )

    def _global_gradient_norm(self) -> float:
        """As DeepSpeed measured it; NaN after a step that overflowed in fp16, for which it keeps none."""
        norm = self._engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def _plain_gradient_norm(self) -> float | None:
        """The norm where DeepSpeed keeps none: in fp32 without ZeRO it hands gradients to the optimizer as they are."""
        if self._settings.zero > 0 or self._settings.precision != "fp32":
            return None
        return torch.stack([parameter.grad.norm() for parameter in self._trainable.values()]).norm().item()

    def _gradient_norms(self) -> dict[str, float]:
        norms = {}
        for name, parameter in self._trainable.items():
            gradient = safe_get_full_grad(parameter) if self._settings.zero > 0 else parameter.grad
            if gradient is None:
                raise TrainingError(f"{name} is declared trainable but got no gradient; is it used in the forward?")
            norms[name] = gradient.float().norm().item()
        return norms


def _config(settings: EngineSettings, on_gpu: bool) -> dict:
    return {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": settings.max_gradient_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": settings.zero,
            "contiguous_gradients": True,
            "overlap_comm": on_gpu,
            # Small tensors such as LoRA factors are partitioned too: their optimizer state must not differ by size.
            "stage3_param_persistence_threshold": 0,
        },
        "bf16": {"enabled": settings.precision == "bf16"},
        "fp16": {"enabled": settings.precision == "fp16", "initial_scale_power": 16, "min_loss_scale": 1},
        "steps_per_print": 1 << 40,
    }
