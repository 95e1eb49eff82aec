"""Where the fp32 values of each trainable parameter lie: ZeRO cuts them up, each level in its own way."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.engine.values import EngineSettings


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a parameter on one rank."""

    rank: int
    start: int
    """In that rank's store."""
    length: int


@dataclass(frozen=True)
class Place:
    """Where the fp32 values of a trainable parameter lie."""

    shape: torch.Size
    store: Tensor
    """What Adam updates on this rank and keys its moments by: one master, or a flat tensor of many."""
    pieces: tuple[Piece, ...]
    """In the order of the parameter's elements."""


def find_places(
    optimizer: Any, trainable: Mapping[str, nn.Parameter], settings: EngineSettings, rank: int, world: int
) -> dict[str, Place]:
    """By parameter name; `optimizer` is DeepSpeed's."""
    parameters = trainable.values()
    if settings.zero == 3:
        found = {each: _place_in_slices(optimizer, each, world) for each in parameters}
    elif settings.zero > 0:
        found = dict(_places_in_flat(optimizer, world))
    else:
        whole = dict(half_and_master(optimizer)) if settings.precision != "fp32" else {each: each for each in parameters}
        found = {each: _whole_place(whole[each], rank) for each in parameters}
    return {name: found[parameter] for name, parameter in trainable.items()}


def half_and_master(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Without ZeRO DeepSpeed keeps masters in groups that mirror those of the half-precision weights."""
    for halves, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(halves, masters, strict=True)


def _whole_place(master: Tensor, rank: int) -> Place:
    return Place(master.shape, master, (Piece(rank, 0, master.numel()),))


def _places_in_flat(optimizer: Any, world: int) -> Iterator[tuple[Tensor, Place]]:
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
            pieces = tuple(Piece(rank, start - cuts[rank], end - start) for rank, start, end in spans if start < end)
            yield parameter, Place(parameter.shape, store, pieces)


def _place_in_slices(optimizer: Any, parameter: Any, world: int) -> Place:
    """ZeRO 3 cuts each parameter into equal slices, the last of them padded, and lays a rank's slices end to end."""
    group, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    left = [min(length, parameter.ds_numel - rank * length) for rank in range(world)]
    pieces = tuple(Piece(rank, start, elements) for rank, elements in enumerate(left) if elements > 0)
    return Place(parameter.ds_shape, optimizer.fp32_partitioned_groups_flat[group], pieces)
