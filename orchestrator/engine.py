"""The DeepSpeed engine: ZeRO 0 to 3 behind one step. DeepSpeed is spoken in this file only.

Trainable parameters compute in the run's precision and keep fp32 masters; frozen ones have no gradient and no optimizer
state. Losses are sums divided by the targets of the global batch, so accumulation and world size change nothing. Nor do
they change what is drawn at random, or what is saved: any engine goes on from any other's state.
"""

import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
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
class _Piece:
    """Consecutive elements of a parameter on one rank."""

    rank: int
    start: int
    """In that rank's store."""
    length: int


@dataclass(frozen=True)
class _Place:
    """Where the fp32 values of a trainable parameter lie."""

    shape: torch.Size
    store: Tensor
    """What Adam updates on this rank and keys its moments by: one master, or a flat tensor of many."""
    pieces: tuple[_Piece, ...]
    """In the order of the parameter's elements."""


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
        self._adam = optimizer
        self._parameters = dict(self._engine.module.named_parameters())
        self._trainable = {name: parameter for name, parameter in self._parameters.items() if parameter.requires_grad}
        self._world = torch.distributed.get_world_size()
        self._rank = torch.distributed.get_rank()
        self._places = self._find_places()
        self._stores = _names_by_store(self._places)
        self._scaler = self._find_scaler()

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
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        scale_was_least = self._scaler is not None and self._scaler.cur_scale <= _least_scale(self._scaler)
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
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> float:
        """Summed loss over all ranks' micro-batches, in nats; every rank must bring as many."""
        self._engine.eval()
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for micro in batches:
            total += self._engine.module(micro.input_ids.to(self.device), micro.labels.to(self.device))
        torch.distributed.all_reduce(total)
        return total.item()

    @torch.no_grad()
    def state(self, keep: bool) -> EngineState:
        """What training can go on from, copied to host memory: training may go on at once. All ranks must call.

        `keep` is true on rank 0 alone, which gets the tensors; the others need no memory for them.
        """
        tensors = {}
        # What lies in one store travels at once: a small tensor by itself would cost as much as a large one.
        for store, names in self._stores.items():
            for part in PARTS:
                shares = self._shares(self._values(store, part), keep)
                if keep:
                    tensors |= {f"{part}.{name}": _on_host(shares, self._places[name]) for name in names}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return EngineState(tensors, {"updates": self._count_updates()} | _scaler_numbers(self._scaler))

    @torch.no_grad()
    def load_state(self, state: EngineState | None) -> None:
        """Goes on from a state, which rank 0 brings and the others do not; all ranks must call, right after construction.

        Raises TrainingError, on all ranks, for a tensor that is missing, superfluous or of another shape.
        """
        message: list[Any] = [_misfit(state, self._places), state.numbers] if state else [None, None]
        torch.distributed.broadcast_object_list(message, src=0, device=self.device)
        misfit, numbers = message
        if misfit:
            raise TrainingError(misfit)
        self._begin_moments(numbers["updates"])
        for name, place in self._places.items():
            for part in PARTS:
                whole = state.tensors[f"{part}.{name}"] if state else torch.empty(place.shape, device=self.device)
                self._spread(whole.to(self.device), place, self._values(place.store, part))
        self._round_masters()
        for name in _scaler_numbers(self._scaler).keys() & numbers.keys():
            setattr(self._scaler, name, numbers[name])

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
        return {name: checksum(self._master(name)) for name in self._trainable}

    def _master(self, name: str) -> Tensor:
        if self._settings.zero > 0:
            return cast(Tensor, safe_get_full_fp32_param(self._trainable[name]))
        return self._places[name].store

    def _update(self, batch: StepBatch, step: int, inspect: bool) -> tuple[Tensor, float, dict[str, float]]:
        """Updates the weights; this rank's part of the summed loss, the gradient's norm and that of each parameter."""
        total = torch.zeros((), device=self.device)
        norms: dict[str, float] = {}
        plain_norm: float | None = None
        forgotten_scale = self._forgotten_scale()
        # DeepSpeed divides by accumulation and averages over ranks; both are undone, since the sum is already global.
        scale = forgotten_scale * self._world * self._settings.accumulation / batch.num_targets
        for number, micro in enumerate(batch.micro_batches):
            self._seed(step, number)
            loss = self._engine(micro.input_ids.to(self.device), micro.labels.to(self.device))
            total += loss.detach()
            self._engine.backward(loss * scale)
            if number == len(batch.micro_batches) - 1:
                plain_norm = self._plain_gradient_norm()
                norms = self._gradient_norms() if inspect else {}
            self._engine.step()
        norm = plain_norm if plain_norm is not None else self._global_gradient_norm() / forgotten_scale
        return total, norm, norms

    def _forgotten_scale(self) -> float:
        """Without ZeRO, DeepSpeed takes fp16's loss scale out of gradients into which it never put it; 1 otherwise."""
        return self._scaler.cur_scale if self._scaler is not None and self._settings.zero == 0 else 1.0

    def _seed(self, step: int, number: int) -> None:
        """Makes what the forward draws a function of the micro-batch's place; ranks hold consecutive slices of the batch."""
        place = self._rank * self._settings.accumulation + number
        mixed = np.random.SeedSequence([self._settings.seed, step, place]).generate_state(1, np.uint64)
        torch.manual_seed(int(mixed[0]))

    def _agree(self, loss: Tensor, wishes: Wishes) -> tuple[float, Wishes]:
        """The loss summed over all ranks, and what any of them wishes, in one exchange."""
        message = torch.tensor([0.0, wishes.stop, wishes.save], device=self.device)
        message[0] = loss
        torch.distributed.all_reduce(message)
        total, stop, save = message.tolist()
        return total, Wishes(stop > 0, save > 0)

    def _find_places(self) -> dict[str, _Place]:
        optimizer, trainable = self._engine.optimizer, self._trainable.values()
        if self._settings.zero == 3:
            found = {each: _place_in_slices(optimizer, each, self._world) for each in trainable}
        elif self._settings.zero > 0:
            found = dict(_places_in_flat(optimizer, self._world))
        else:
            masters = dict(_masters(optimizer)) if self._settings.precision != "fp32" else {each: each for each in trainable}
            found = {each: _whole_place(masters[each], self._rank) for each in trainable}
        return {name: found[parameter] for name, parameter in self._trainable.items()}

    def _values(self, store: Tensor, part: str) -> Tensor:
        """A part's values in a store of this rank, as one row; Adam has no moments before its first update."""
        if part == "master":
            return store.detach().view(-1)
        moments = self._adam.state.get(store)
        return moments[part].view(-1) if moments else torch.zeros_like(store).view(-1)

    def _shares(self, values: Tensor, keep: bool) -> dict[int, Tensor]:
        """Each rank's values, by rank, where they are kept; without ZeRO every rank has all of them."""
        if self._settings.zero == 0:
            return {self._rank: values}
        shares = torch.empty(self._world, len(values), device=self.device) if keep else None
        torch.distributed.gather(values, list(shares) if shares is not None else None, dst=0)
        return dict(enumerate(shares)) if shares is not None else {}

    def _spread(self, whole: Tensor, place: _Place, values: Tensor) -> None:
        """Rank 0's tensor to the values of every rank that has some of it."""
        torch.distributed.broadcast(whole, src=0)
        parts = whole.view(-1).split([piece.length for piece in place.pieces])
        for piece, elements in zip(place.pieces, parts, strict=True):
            if piece.rank == self._rank:
                values[piece.start : piece.start + piece.length] = elements

    def _begin_moments(self, updates: int) -> None:
        """Moments as Adam makes them at its first update; DeepSpeed under ZeRO finds them at its own next one."""
        for store in self._stores:
            # Adam wants its count beside the weights for the fused kernel, else in host memory.
            count = torch.tensor(float(updates), device=self.device if self._adam.defaults["fused"] else "cpu")
            self._adam.state[store] = {"step": count} | {part: torch.zeros_like(store) for part in PARTS[1:]}

    def _count_updates(self) -> int:
        store = next(iter(self._stores))
        return int(self._adam.state[store]["step"].item()) if store in self._adam.state else 0

    def _round_masters(self) -> None:
        """Makes the weights that the model computes with from the masters, as a step does at its end."""
        optimizer = self._engine.optimizer
        if self._settings.zero in (1, 2):
            optimizer.update_lp_params()
        elif self._settings.zero == 3:
            for weights, masters in zip(
                optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
            ):
                weights.copy_(masters)
        elif self._settings.precision != "fp32":
            for weight, master in _masters(optimizer):
                weight.copy_(master)

    def _find_scaler(self) -> Any:
        """What DeepSpeed scales the loss by, in fp16."""
        if self._settings.precision != "fp16":
            return None
        optimizer = self._engine.optimizer
        if self._settings.zero == 0:
            return optimizer.loss_scale_config
        # At the minimum DeepSpeed would raise a bare Exception instead of skipping the step.
        optimizer.loss_scaler.raise_error_at_min_scale = False
        return optimizer.loss_scaler

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
            norms[name] = gradient.float().norm().item() / (self._scaler.cur_scale if self._scaler is not None else 1.0)
        return norms


def _masters(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Without ZeRO DeepSpeed keeps masters in groups that mirror those of the half-precision weights."""
    for halves, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(halves, masters, strict=True)


def _names_by_store(places: dict[str, _Place]) -> dict[Tensor, list[str]]:
    names = defaultdict(list)
    for name, place in places.items():
        names[place.store].append(name)
    return names


def _whole_place(master: Tensor, rank: int) -> _Place:
    return _Place(master.shape, master, (_Piece(rank, 0, master.numel()),))


def _places_in_flat(optimizer: Any, world: int) -> Iterator[tuple[Tensor, _Place]]:
    """ZeRO 1 and 2 lay all parameters of a group end to end and cut that into one store for each rank."""
    groups = zip(
        optimizer.round_robin_bit16_groups,
        optimizer.round_robin_bit16_offsets,
        optimizer.single_partition_of_fp32_groups,
        strict=True,
    )
    for parameters, offsets, store in groups:
        cuts = [rank * len(store) for rank in range(world + 1)]
        for parameter, first in zip(parameters, offsets, strict=True):
            last = first + parameter.numel()
            spans = [(rank, max(first, cuts[rank]), min(last, cuts[rank + 1])) for rank in range(world)]
            pieces = tuple(_Piece(rank, start - cuts[rank], end - start) for rank, start, end in spans if start < end)
            yield parameter, _Place(parameter.shape, store, pieces)


def _place_in_slices(optimizer: Any, parameter: Any, world: int) -> _Place:
    """ZeRO 3 cuts each parameter into equal slices, the last of them padded, and lays a rank's slices end to end."""
    group, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    left = [min(length, parameter.ds_numel - rank * length) for rank in range(world)]
    pieces = tuple(_Piece(rank, start, elements) for rank, elements in enumerate(left) if elements > 0)
    return _Place(parameter.ds_shape, optimizer.fp32_partitioned_groups_flat[group], pieces)


def _on_host(shares: dict[int, Tensor], place: _Place) -> Tensor:
    """A whole parameter's values in host memory of its own."""
    whole = torch.cat([shares[piece.rank].narrow(0, piece.start, piece.length) for piece in place.pieces]).view(place.shape)
    if not whole.is_cuda:
        return whole
    # From pinned memory on, copies of all parameters are under way at once.
    return torch.empty(place.shape, pin_memory=True).copy_(whole, non_blocking=True)


def _misfit(state: EngineState, places: dict[str, _Place]) -> str | None:
    """What is wrong with a state's tensors, if anything."""
    shapes = {f"{part}.{name}": tuple(place.shape) for name, place in places.items() for part in PARTS}
    for key, shape in shapes.items():
        if key not in state.tensors:
            return f"the saved state lacks {key}, which this stage trains"
        if tuple(state.tensors[key].shape) != shape:
            return f"the saved state's {key} is {tuple(state.tensors[key].shape)}, this stage's is {shape}"
    superfluous = next((key for key in state.tensors if key not in shapes), None)
    return f"the saved state holds {superfluous}, which this stage does not train" if superfluous else None


def _scaler_numbers(scaler: Any) -> dict[str, int | float]:
    """What DeepSpeed's dynamic loss scale depends on; its scaler without ZeRO has no hysteresis."""
    names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    return {name: getattr(scaler, name) for name in names if hasattr(scaler, name)}


def _least_scale(scaler: Any) -> float:
    return scaler.min_loss_scale if hasattr(scaler, "min_loss_scale") else scaler.min_scale


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
