"""Adam by torch or, in 8 bits or paged, by bitsandbytes, and the moments that it keeps, as fp32."""

from collections.abc import Sequence
from typing import Any, Protocol

import bitsandbytes
import torch
from torch import Tensor

from orchestrator.engine.values import EngineSettings

_MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2}
"""The numbers by which bitsandbytes calls them."""
_BLOCK = 256
"""Consecutive values that share a scale in bitsandbytes' 8-bit Adam."""
_BLOCKS_AT_ONCE = 1 << 14


class Moments(Protocol):
    """Adam's, of each store: a tensor that it updates as a whole."""

    def count(self, store: Tensor) -> int:
        """Updates so far."""
        ...

    def begin(self, store: Tensor, updates: int) -> None:
        """Makes moments of zero."""
        ...

    def read(self, store: Tensor, part: str) -> Tensor:
        """As one row in fp32; zeros before the first update."""
        ...

    def draft(self, store: Tensor, part: str) -> Tensor:
        """A row in fp32 to write values into, after `begin`; `keep` takes them."""
        ...

    def keep(self, store: Tensor, part: str, draft: Tensor) -> None: ...


def make_adam(groups: Sequence[dict[str, Any]], settings: EngineSettings) -> tuple[torch.optim.Optimizer, Moments]:
    """AdamW without a learning rate yet."""
    if settings.optimizer == "adamw":
        fused = torch.optim.AdamW(groups, lr=0.0, weight_decay=settings.weight_decay, fused=True)
        return fused, _TorchMoments(fused)
    adam = bitsandbytes.optim.AdamW(
        groups,
        lr=0.0,
        weight_decay=settings.weight_decay,
        optim_bits=8 if settings.optimizer.endswith("8bit") else 32,
        is_paged=settings.optimizer.startswith("paged"),
    )
    return adam, _BitsAndBytesMoments(adam)


class _TorchMoments:
    def __init__(self, adam: torch.optim.Optimizer) -> None:
        self._adam = adam

    def count(self, store: Tensor) -> int:
        return int(self._adam.state[store]["step"].item()) if store in self._adam.state else 0

    def begin(self, store: Tensor, updates: int) -> None:
        # Adam wants its count beside the weights for the fused kernel, else in host memory.
        count = torch.tensor(float(updates), device=store.device if self._adam.defaults["fused"] else "cpu")
        self._adam.state[store] = {"step": count} | {part: torch.zeros_like(store) for part in _MOMENTS}

    def read(self, store: Tensor, part: str) -> Tensor:
        state = self._adam.state.get(store)
        return state[part].view(-1) if state else torch.zeros_like(store).view(-1)

    def draft(self, store: Tensor, part: str) -> Tensor:
        return self._adam.state[store][part].view(-1)

    def keep(self, store: Tensor, part: str, draft: Tensor) -> None:
        """They are written where they stay."""


class _BitsAndBytesMoments:
    """Those in 8 bits travel as what they stand for, and get their bytes back where the store is cut as it was."""

    def __init__(self, adam: Any) -> None:
        self._adam = adam

    def count(self, store: Tensor) -> int:
        return self._adam.state[store]["step"] if store in self._adam.state else 0

    def begin(self, store: Tensor, updates: int) -> None:
        # As its own init_state does, which ZeRO-3 leaves no place in a group to be called with.
        adam = self._adam
        in_bytes = adam.args.optim_bits == 8 and store.numel() >= adam.args.min_8bit_size
        state: dict[str, Any] = {"step": updates}
        for part, number in _MOMENTS.items():
            state[f"state{number}"] = adam.get_state_buffer(store, dtype=torch.uint8 if in_bytes else torch.float32)
            if in_bytes:
                state[f"qmap{number}"] = self._code(part).to(store.device)
                state[f"absmax{number}"] = torch.zeros(-(-store.numel() // _BLOCK), device=store.device)
        adam.state[store] = state

    def read(self, store: Tensor, part: str) -> Tensor:
        state, number = self._adam.state.get(store), _MOMENTS[part]
        if not state:
            return torch.zeros_like(store).view(-1)
        values = state[f"state{number}"].view(-1)
        if values.dtype != torch.uint8:
            return values
        code, scales = state[f"qmap{number}"], state[f"absmax{number}"]
        found = torch.empty(len(values), device=values.device)
        for start in range(0, len(scales), _BLOCKS_AT_ONCE):
            first, last = start * _BLOCK, (start + _BLOCKS_AT_ONCE) * _BLOCK
            repeated = scales[start : start + _BLOCKS_AT_ONCE].repeat_interleave(_BLOCK)
            piece = code[values[first:last].int()]
            found[first:last] = piece * repeated[: len(piece)]
        return found

    def draft(self, store: Tensor, part: str) -> Tensor:
        values = self._adam.state[store][f"state{_MOMENTS[part]}"].view(-1)
        return values if values.dtype != torch.uint8 else torch.zeros(len(values), device=values.device)

    def keep(self, store: Tensor, part: str, draft: Tensor) -> None:
        state, number = self._adam.state[store], _MOMENTS[part]
        values = state[f"state{number}"].view(-1)
        if values.dtype == torch.uint8:
            code, scales = state[f"qmap{number}"], state[f"absmax{number}"]
            for start in range(0, len(scales), _BLOCKS_AT_ONCE):
                first, last = start * _BLOCK, (start + _BLOCKS_AT_ONCE) * _BLOCK
                values[first:last], scales[start : start + _BLOCKS_AT_ONCE] = in_bytes(draft[first:last], code)

    def _code(self, part: str) -> Tensor:
        if "dynamic" not in self._adam.name2qmap:
            self._adam.fill_qmap()
        return self._adam.name2qmap["dynamic" if part == "exp_avg" else "udynamic"]


def in_bytes(values: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each of fp32 `values` [n] in an ascending `code` [256], and the scale of every 256 of them.

    What such bytes stood for becomes the same bytes again: the largest of a block stands at an end of the code.
    """
    padded = torch.nn.functional.pad(values, (0, -len(values) % _BLOCK)).view(-1, _BLOCK)
    scales = padded.amax(1).clamp_min(0) / code[-1]
    if code[0] < 0:
        scales = torch.maximum(scales, padded.amin(1).clamp_max(0) / code[0])
    scaled = padded / torch.where(scales > 0, scales, 1)[:, None]
    places = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2)
    return places.to(torch.uint8).view(-1)[: len(values)], scales
