"""Every weight moves, but only within a random subspace: theta = theta_0 + P(z), with z of few dimensions.

Li et al. 2018; the structure-aware form with a scale for each block and Fastfood's projection (Le et al. 2013), which costs
n log n and needs no matrix, as Aghajanyan et al. 2021 measured the intrinsic dimension of language models.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.errors import RecipeError
from orchestrator.schema import Subspace

NAME = "subspace"
"""Of the module, beside the parts of the model itself."""
_BLOCK = re.compile(r"\.(\d+)\.")


class SubspaceModule(nn.Module):
    """Coordinates [d] in the subspace, zero at first, and what they move each weight of the model by."""

    def __init__(self, model: nn.Module, method: Subspace, seed: int) -> None:
        super().__init__()
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        groups = list(dict.fromkeys(_group(name) for name in shapes))
        self._group_of = {name: groups.index(_group(name)) for name in shapes}
        num_scales = len(groups) if method.structure_aware else 0
        if method.dimension <= num_scales:
            raise RecipeError(
                f"method.dimension: {method.dimension} must be above {num_scales}, since each block has a scale among them"
            )
        like = next(model.parameters())
        self.coordinates = nn.Parameter(torch.zeros(method.dimension - num_scales, dtype=like.dtype, device=like.device))
        self.scales = nn.Parameter(torch.ones(num_scales, dtype=like.dtype, device=like.device)) if num_scales else None
        sizes = {name: shape.numel() for name, shape in shapes.items()}
        shared = {name: self._numbers_beside(name, sizes) for name in sizes}
        # No buffers, which DeepSpeed would round.
        self._projections = {
            name: _Fastfood(len(self.coordinates), size, (size / shared[name]) ** 0.5, seed + number)
            for number, (name, size) in enumerate(sizes.items())
        }

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """All weights of the model where they are now, by name."""
        known = {name: parameter for name, parameter in model.named_parameters() if name in self._projections}
        return dict(self.moved(known.items()))

    def moved(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Named weights, as they were at first, where the coordinates take them."""
        for name, weight in weights:
            way = self._projections[name](self.coordinates.float()).view(weight.shape)
            if self.scales is not None:
                way = way * self.scales[self._group_of[name]].float()
            yield name, (weight.to(way) + way).to(weight)

    def _numbers_beside(self, name: str, sizes: Mapping[str, int]) -> int:
        """Of the weights that are moved as one: those of the block, or of the whole model where no block has a scale."""
        if self.scales is None:
            return sum(sizes.values())
        return sum(size for other, size in sizes.items() if self._group_of[other] == self._group_of[name])


class _Fastfood:
    """P(z) = c H G Pi H B z [n] of z [d], of about the length of z times `length`: random signs B, a permutation Pi,
    Gaussian G, and Hadamard's matrix H."""

    def __init__(self, dimension: int, size: int, length: float, seed: int) -> None:
        self._size, self._dimension = size, dimension
        generator = torch.Generator().manual_seed(seed)
        self._padded = 1 << (max(size, dimension) - 1).bit_length()
        self._signs = torch.randint(0, 2, (dimension,), generator=generator) * 2.0 - 1
        self._order = torch.randperm(self._padded, generator=generator)
        self._gaussian = torch.randn(self._padded, generator=generator)
        self._factor = length / (self._gaussian.norm().item() * math.sqrt(size))

    def __call__(self, z: Tensor) -> Tensor:
        for name in ("_signs", "_order", "_gaussian"):
            setattr(self, name, getattr(self, name).to(z.device))
        spread = nn.functional.pad(self._signs * z, (0, self._padded - self._dimension))
        mixed = _hadamard(_hadamard(spread)[self._order] * self._gaussian)
        return self._factor * mixed[: self._size]


class _Hadamard(torch.autograd.Function):
    """H x [n], n a power of two. H is symmetric, so the gradient is H g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        half = 1
        while half < len(x):
            pairs = x.view(-1, 2, half)
            x = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).view(-1)
            half *= 2
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _hadamard(gradients[0].contiguous())


def _hadamard(x: Tensor) -> Tensor:
    return _Hadamard.apply(x)


def _group(name: str) -> str:
    """The block of a weight; all that is in none is one."""
    found = _BLOCK.search(name)
    return found[1] if found else ""
