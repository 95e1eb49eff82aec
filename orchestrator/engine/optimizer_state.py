"""Masters and Adam's moments, gathered from all ranks and spread to them, whatever ZeRO has made of them."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.engine.adam import Moments
from orchestrator.engine.loss_scale import LossScale
from orchestrator.engine.places import Place, find_places, half_and_master
from orchestrator.engine.values import PARTS, EngineSettings, EngineState, StateStream
from orchestrator.errors import TrainingError
from orchestrator.model.checksum import checksum
from orchestrator.model.tensor_stream import Part, TensorStream

_AT_ONCE = 1 << 23
"""Values of all ranks that travel together: all there are would take as much memory again, on the device, as they do."""


class OptimizerState:
    """What steps change. All ranks must call each method together."""

    def __init__(
        self,
        optimizer: Any,
        moments: Moments,
        trainable: Mapping[str, nn.Parameter],
        settings: EngineSettings,
        device: torch.device,
    ) -> None:
        """`optimizer` is DeepSpeed's, around the Adam that has these moments."""
        self._optimizer, self._moments, self._device = optimizer, moments, device
        self._zero, self._precision = settings.zero, settings.precision
        self._world, self._rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        self._loss_scale = LossScale(optimizer, settings)
        self._places = find_places(optimizer, trainable, settings, self._rank, self._world)
        self._stores = _names_by_store(self._places)

    @property
    def loss_scale(self) -> LossScale:
        return self._loss_scale

    def gather(self, keep: bool) -> StateStream:
        """What training can go on from. All ranks must call, and read the tensors to their end.

        `keep` is true on rank 0 alone, which gets the tensors; to the others none come.
        """
        layout = {
            f"{part}.{name}": torch.empty(place.shape, device="meta")
            for name, place in self._places.items()
            for part in PARTS
            if keep
        }
        numbers = {"updates": self._moments.count(next(iter(self._stores)))} | self._loss_scale.numbers()
        return StateStream(TensorStream(layout, self._parts(keep)), numbers)

    @torch.no_grad()
    def master_checksums(self) -> dict[str, int]:
        """Of each trainable parameter's fp32 master, the same on every rank."""
        sums = torch.zeros(len(self._places), dtype=torch.int64, device=self._device)
        for number, place in enumerate(self._places.values()):
            values, first = self._values(place.store, "master"), 0
            for piece in place.pieces:
                if piece.rank == self._rank:
                    sums[number] += checksum(values[piece.start : piece.start + piece.length], first)
                first += piece.length
        if self._zero > 0:
            # They wrap around, as those of a whole tensor do.
            torch.distributed.all_reduce(sums)
        return dict(zip(self._places, sums.tolist(), strict=True))

    def _parts(self, keep: bool) -> Iterator[Part]:
        """What lies in one store travels together: a small tensor by itself would cost as much as a large one."""
        at_once = max(1, _AT_ONCE // self._world)
        for store, names in self._stores.items():
            for part in PARTS:
                values = self._values(store, part)
                for start in range(0, len(values), at_once):
                    shares = self._shares(values[start : start + at_once], keep)
                    for name in names if keep else ():
                        for first, found in _found_in(shares, start, self._places[name]):
                            yield f"{part}.{name}", first, found.cpu()

    @torch.no_grad()
    def spread(self, state: EngineState | None) -> None:
        """Goes on from a state, which rank 0 brings and the others do not; all ranks must call.

        Raises TrainingError, on all ranks, for a tensor that is missing, superfluous or of another shape.
        """
        message: list[Any] = [_misfit(state, self._places), state.numbers] if state else [None, None]
        torch.distributed.broadcast_object_list(message, src=0, device=self._device)
        misfit, numbers = message
        if misfit:
            raise TrainingError(misfit)
        for store, names in self._stores.items():
            # DeepSpeed under ZeRO finds moments at its own next update.
            self._moments.begin(store, numbers["updates"])
            for part in PARTS:
                values = self._values(store, part) if part == "master" else self._moments.draft(store, part)
                for name in names:
                    self._spread_tensor(state.tensors[f"{part}.{name}"] if state else None, self._places[name], values)
                if part != "master":
                    self._moments.keep(store, part, values)
        self._round_masters()
        self._loss_scale.load(numbers)

    def _values(self, store: Tensor, part: str) -> Tensor:
        """A part's values in a store of this rank, as one row."""
        return store.detach().view(-1) if part == "master" else self._moments.read(store, part)

    def _shares(self, values: Tensor, keep: bool) -> dict[int, Tensor]:
        """Each rank's values, by rank, where they are kept; without ZeRO every rank has all of them."""
        if self._zero == 0:
            return {self._rank: values}
        shares = torch.empty(self._world, len(values), device=self._device) if keep else None
        torch.distributed.gather(values, list(shares) if shares is not None else None, dst=0)
        return dict(enumerate(shares)) if shares is not None else {}

    def _spread_tensor(self, tensor: Tensor | None, place: Place, values: Tensor) -> None:
        """Rank 0's tensor to the values of every rank that has some of it."""
        whole = torch.empty(place.shape, device=self._device) if tensor is None else tensor.to(self._device)
        torch.distributed.broadcast(whole, src=0)
        parts = whole.view(-1).split([piece.length for piece in place.pieces])
        for piece, elements in zip(place.pieces, parts, strict=True):
            if piece.rank == self._rank:
                values[piece.start : piece.start + piece.length] = elements

    def _round_masters(self) -> None:
        """Makes the weights that the model computes with from the masters, as a step does at its end."""
        optimizer = self._optimizer
        if self._zero in (1, 2):
            optimizer.update_lp_params()
        elif self._zero == 3:
            for weights, masters in zip(
                optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
            ):
                weights.copy_(masters)
        elif self._precision != "fp32":
            for weight, master in half_and_master(optimizer):
                weight.copy_(master)


def _names_by_store(places: dict[str, Place]) -> dict[Tensor, list[str]]:
    names = defaultdict(list)
    for name, place in places.items():
        names[place.store].append(name)
    return names


def _found_in(shares: dict[int, Tensor], start: int, place: Place) -> Iterator[tuple[int, Tensor]]:
    """What the ranks' values from `start` on hold of a parameter, each with its place in the parameter as one row."""
    before = 0
    for piece in place.pieces:
        share = shares[piece.rank]
        first, last = max(piece.start, start), min(piece.start + piece.length, start + len(share))
        if first < last:
            yield before + first - piece.start, share[first - start : last - start]
        before += piece.length


def _misfit(state: EngineState, places: dict[str, Place]) -> str | None:
    """What is wrong with a state's tensors, if anything."""
    shapes = {f"{part}.{name}": tuple(place.shape) for name, place in places.items() for part in PARTS}
    for key, shape in shapes.items():
        if key not in state.tensors:
            return f"the saved state lacks {key}, which this stage trains"
        if tuple(state.tensors[key].shape) != shape:
            return f"the saved state's {key} is {tuple(state.tensors[key].shape)}, this stage's is {shape}"
    superfluous = next((key for key in state.tensors if key not in shapes), None)
    return f"the saved state holds {superfluous}, which this stage does not train" if superfluous else None
