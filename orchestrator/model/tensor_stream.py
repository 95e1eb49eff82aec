"""Tensors that come a part at a time, so that nobody needs to hold them all."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Part = tuple[str, int, Tensor]
"""A tensor's name, the first of its elements that come, and these, as one row on the host."""


@dataclass(frozen=True)
class TensorStream:
    """To be read once, by `whole`, by `drop`, or part by part."""

    layout: Mapping[str, Tensor]
    """Shape and dtype of each, which need no values: they may be on the meta device."""
    parts: Iterable[Part]
    """Of all of them, in any order, each element once."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "TensorStream":
        """Of tensors that are there."""
        return cls(tensors, ((name, 0, tensor.reshape(-1)) for name, tensor in tensors.items()))

    def whole(self) -> dict[str, Tensor]:
        """All of them, in memory of their own."""
        found = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in self.layout.items()}
        for name, first, values in self.parts:
            found[name].view(-1)[first : first + len(values)] = values
        return found

    def drop(self) -> None:
        """Reads it for nothing: where ranks make the parts together, each must come to the end of them."""
        for _ in self.parts:
            pass
