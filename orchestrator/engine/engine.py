"""The DeepSpeed engine: ZeRO 0 to 3 behind one step. DeepSpeed is spoken in this file only.

Trainable parameters compute in the run's precision and keep fp32 masters; frozen ones have no gradient and no optimizer
state. Losses are sums divided by the targets of the global batch, so accumulation and world size change nothing. Nor do
they change what is drawn at random, or what is saved: any engine goes on from any other's state.
"""

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.cpp_extension import _get_build_directory

# On a machine without a GPU DeepSpeed would guess, and say so.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.torch import build_shm_op
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_local_grad

from orchestrator.data.batches import MicroBatch, StepBatch
from orchestrator.engine.adam import make_adam
from orchestrator.engine.build_lock import building
from orchestrator.engine.clock import StepClock
from orchestrator.engine.configuration import deepspeed_config, parameter_groups
from orchestrator.engine.optimizer_state import OptimizerState
from orchestrator.engine.values import NO_WISHES, EngineSettings, EngineState, StateStream, StepResult, Wishes
from orchestrator.errors import TrainingError
from orchestrator.model.checksum import checksum
from orchestrator.model.tensor_stream import Part

deepspeed_logger.setLevel(logging.ERROR)
deepspeed.utils.logger.setLevel(logging.ERROR)


class Engine:
    """A model whose forward gives a summed loss, spread over the ranks. All ranks must call each method together."""

    def __init__(self, model: nn.Module, settings: EngineSettings) -> None:
        self._settings = settings
        on_gpu = torch.cuda.is_available()
        self._rate_factors, groups = parameter_groups(model, settings)
        optimizer, moments = make_adam(groups, settings)
        if not on_gpu:
            _build_op()
        # The engine's attributes come from many mixins, and its annotations say too little to check against.
        self._engine, *_ = cast(Any, deepspeed.initialize)(
            model=model, optimizer=optimizer, config=deepspeed_config(settings, on_gpu), dist_init_required=False
        )
        # Without ZeRO, DeepSpeed makes the moments by a step on zero gradients. Adam counts it, and its first real update
        # comes out a quarter too small; without the state it starts at one, as in ZeRO 1 to 3.
        if settings.zero == 0:
            optimizer.state.clear()
        self._parameters = dict(self._engine.module.named_parameters())
        self._trainable = {name: parameter for name, parameter in self._parameters.items() if parameter.requires_grad}
        self._world = torch.distributed.get_world_size()
        self._rank = torch.distributed.get_rank()
        self._state = OptimizerState(self._engine.optimizer, moments, self._trainable, settings, self.device)
        self._loss_scale = self._state.loss_scale
        self._clock = StepClock(on_gpu)
        if not on_gpu:
            _time_communication(self._clock)

    @property
    def device(self) -> torch.device:
        return self._engine.device

    def step(
        self, batch: StepBatch, learning_rate: float, step: int, inspect: bool = False, wishes: Wishes = NO_WISHES
    ) -> StepResult:
        """One optimizer update over a global batch; `inspect` also measures each parameter's gradient.

        `step` is the number of the update, from 0. With the seed and the place in the global batch it decides what dropout
        drops, so that another number of workers, or a run that was resumed, drops the same.
        """
        # What was exchanged between two steps, or before the first, is no part of this one.
        self._clock.forget("communication")
        self._engine.train()
        for group, factor in zip(self._engine.optimizer.param_groups, self._rate_factors, strict=True):
            group["lr"] = factor * learning_rate
        scale_was_least = self._loss_scale.is_least
        loss, norm, norms = self._update(batch, step, inspect)
        total, wishes = self._agree(loss, wishes)
        skipped = self._settings.precision == "fp16" and bool(self._engine.optimizer.overflow)
        return StepResult(
            loss=total / batch.num_targets,
            gradient_norm=norm,
            learning_rate=learning_rate,
            num_tokens=batch.num_tokens,
            num_targets=batch.num_targets,
            skipped=skipped,
            scale_is_spent=skipped and scale_was_least,
            gradient_norms=norms,
            wishes=wishes,
            # The exchange above has waited for the device.
            seconds=self._clock.read(),
        )

    def rehearse(self, micro: MicroBatch) -> None:
        """Forward and backward of which nothing stays: what is too large for the device shows before the first step."""
        self._engine.train()
        loss = self._engine.module(*micro.on(self.device))
        torch.autograd.grad(loss, list(self._trainable.values()), allow_unused=True)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> float:
        """Summed loss over all ranks' micro-batches, in nats; every rank must bring as many."""
        self._engine.eval()
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for micro in batches:
            total += self._engine.module(*micro.on(self.device))
        torch.distributed.all_reduce(total)
        return total.item()

    @torch.no_grad()
    def next_logits(self, input_ids: Tensor) -> Tensor:
        """Of the token after each row [m, vocabulary]; every rank must bring the same rows, int64 [m, n]."""
        self._engine.eval()
        return self._engine.module(input_ids.to(self.device))

    def counted(self, part: str) -> AbstractContextManager[None]:
        """What is done within a `with` between two steps counts to that part of the later one."""
        return self._clock.part(part)

    def state(self, keep: bool) -> StateStream:
        """What training can go on from; the ranks gather it as they read its tensors, each to their end.

        `keep` is true on rank 0 alone, which gets the tensors; to the others none come.
        """
        state = self._state.gather(keep)
        return replace(state, tensors=replace(state.tensors, parts=self._timed(state.tensors.parts)))

    def load_state(self, state: EngineState | None) -> None:
        """Goes on from a state, which rank 0 brings and the others do not.

        Raises TrainingError, on all ranks, for a tensor that is missing, superfluous or of another shape.
        """
        self._state.spread(state)

    def parameters(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The named parameters, whole, on CPU, in the precision the model computes with; a step may change them."""
        for name in names:
            parameter = self._parameters[name]
            if self._settings.zero < 3:
                yield name, parameter.detach().cpu()
                continue
            # Each rank has a slice; gathering one at a time needs no room for the whole model.
            with GatheredParameters([parameter]):
                yield name, parameter.detach().cpu().clone()

    def layout(self) -> dict[str, Tensor]:
        """Each parameter's whole shape and its dtype, on the meta device."""
        return {
            name: torch.empty(getattr(parameter, "ds_shape", parameter.shape), dtype=parameter.dtype, device="meta")
            for name, parameter in self._parameters.items()
        }

    def frozen_checksums(self) -> dict[str, int]:
        """A checksum of each frozen parameter, or of this rank's part of it."""
        frozen = ((name, parameter) for name, parameter in self._parameters.items() if not parameter.requires_grad)
        return {name: checksum(getattr(parameter, "ds_tensor", parameter)) for name, parameter in frozen}

    def master_checksums(self) -> dict[str, int]:
        """A checksum of the fp32 master of each trainable parameter."""
        return self._state.master_checksums()

    def _timed(self, parts: Iterable[Part]) -> Iterator[Part]:
        """What becomes of the parts counts, too: training waits for it."""
        with self._clock.part("checkpoint"):
            yield from parts

    def _update(self, batch: StepBatch, step: int, inspect: bool) -> tuple[Tensor, float, dict[str, float]]:
        """Updates the weights; this rank's part of the summed loss, the gradient's norm and that of each parameter."""
        total = torch.zeros((), device=self.device)
        norms: dict[str, float] = {}
        plain_norm: float | None = None
        forgotten_scale = self._loss_scale.forgotten
        # DeepSpeed divides by accumulation and averages over ranks; both are undone, since the sum is already global.
        scale = forgotten_scale * self._world * self._settings.accumulation / batch.num_targets
        for number, micro in enumerate(batch.micro_batches):
            self._seed(step, number)
            with self._clock.part("forward"):
                loss = self._engine(*micro.on(self.device))
                total += loss.detach()
            with self._clock.part("backward"):
                self._engine.backward(loss * scale)
            if number == len(batch.micro_batches) - 1:
                plain_norm = self._plain_gradient_norm()
                norms = self._gradient_norms() if inspect else {}
            with self._clock.part("optimizer"):
                self._engine.step()
        norm = plain_norm if plain_norm is not None else self._global_gradient_norm() / forgotten_scale
        return total, norm, norms

    def _seed(self, step: int, number: int) -> None:
        """Makes what the forward draws a function of the micro-batch's place; ranks take those of the batch in turns."""
        place = number * self._world + self._rank
        mixed = np.random.SeedSequence([self._settings.seed, step, place]).generate_state(1, np.uint64)
        torch.manual_seed(int(mixed[0]))

    def _agree(self, loss: Tensor, wishes: Wishes) -> tuple[float, Wishes]:
        """The loss summed over all ranks, and what any of them wishes, in one exchange."""
        message = torch.tensor([0.0, wishes.stop, wishes.save], device=self.device)
        message[0] = loss
        with self._clock.part("communication"):
            torch.distributed.all_reduce(message)
        total, stop, save = message.tolist()
        return total, Wishes(stop > 0, save > 0)

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
        """Of each trainable parameter, from what each rank has of its gradient."""
        squares = torch.zeros(len(self._trainable), dtype=torch.float64, device=self.device)
        for number, (name, parameter) in enumerate(self._trainable.items()):
            gradient = self._gradient_here(name, parameter)
            if gradient is not None:
                squares[number] = gradient.norm(dtype=torch.float32).double() ** 2
        if self._settings.zero > 0:
            torch.distributed.all_reduce(squares)
        norms = squares.sqrt() / self._loss_scale.now
        return dict(zip(self._trainable, norms.tolist(), strict=True))

    def _gradient_here(self, name: str, parameter: Any) -> Tensor | None:
        """This rank's part of a parameter's reduced gradient; None where it has no part of it."""
        if self._settings.zero == 3:
            return safe_get_local_grad(parameter)
        if self._settings.zero > 0:
            mapping = parameter._hp_mapping
            return mapping and mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        if parameter.grad is None:
            raise TrainingError(f"{name} is declared trainable but got no gradient; is it used in the forward?")
        return parameter.grad


def _build_op() -> None:
    """The exchange between processes of one machine, which DeepSpeed builds where it is not there yet; half a minute."""
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    with building(Path(_get_build_directory(builder.NAME, verbose=False))):
        build_shm_op()


def _time_communication(clock: StepClock) -> None:
    """Counts what DeepSpeed's exchanges take, with the wait for the slowest rank, to a part of its own.

    For CPUs, where an exchange is over when the call returns; on a GPU it goes on beside the computation.
    """
    backend = deepspeed.comm.comm.cdb
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        # Of the class, since an earlier engine of this process has put its own before it.
        method = getattr(type(backend), name)

        def timed(*arguments: Any, method: Callable[..., Any] = method, **named: Any) -> Any:
            with clock.part("communication"):
                return method(backend, *arguments, **named)

        setattr(backend, name, timed)
