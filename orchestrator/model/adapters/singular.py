"""Factors that begin as singular vectors: of a weight, from which they are taken out (PiSSA), or of what quantization took
from one (LoftQ).

The base on disk stays what it is. So what is written holds the difference, the factors as they are now beside those that
they began as: twice the rank, and PEFT loads it as plain LoRA. After PiSSA it computes what was trained; after LoftQ that
without what quantization took, but for what the factors could not hold of it.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from orchestrator.model.adapters.names import ADAPTER
from orchestrator.plan.targets import ends_in

_BEGAN = "began_as"
_LARGEST_WHOLE = 1024
"""Of a weight's shorter side, whose singular vectors are computed exactly; beyond that as closely as 16 iterations come."""


@torch.no_grad()
def take_out(model: nn.Module, targets: Sequence[str]) -> None:
    """Lets the targets' factors begin with W's largest singular vectors, and leaves W - (alpha / rank) B A in its place."""
    for _, module in _layers(model, targets):
        weight = module.get_base_layer().get_parameter("weight")
        weight.copy_(weight.float() - _begin(module, weight.float()))


@torch.no_grad()
def make_up(model: nn.Module, targets: Sequence[str], weight_of: Callable[[str], Tensor]) -> None:
    """Lets the targets' factors begin with the largest singular vectors of what quantization took from W.

    `weight_of` gives a weight by name as it was before.
    """
    for name, module in _layers(model, targets):
        quantized = dequantize_module_weight(module.get_base_layer()).float()
        _begin(module, weight_of(f"{name}.weight").to(quantized) - quantized)


def beginnings(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B as they began, by the layer's name, of those whose weight lacks them."""
    return {
        name: getattr(module, _BEGAN)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and hasattr(module, _BEGAN)
    }


def difference(now: tuple[Tensor, Tensor], began: tuple[Tensor, Tensor], rslora: bool) -> tuple[Tensor, Tensor]:
    """Factors A [2r, in] and B [out, 2r] of B A - B0 A0, for twice the alpha."""
    first = torch.cat([now[0], began[0].to(now[0])])
    second = torch.cat([now[1], -began[1].to(now[1])], 1)
    # alpha / sqrt(r) grows with both doubled; alpha / r does not.
    return first, second / 2**0.5 if rslora else second


def _begin(module: LoraLayer, matrix: Tensor) -> Tensor:
    """Makes (alpha / rank) B A the nearest to a matrix that its rank allows, and gives that."""
    first, second = (factors[ADAPTER].get_parameter("weight") for factors in (module.lora_A, module.lora_B))
    scale = module.scaling[ADAPTER]
    left, values, right = _largest(matrix, len(first))
    root = (values / scale).sqrt()
    second.copy_(left * root)
    first.copy_(root[:, None] * right)
    # No buffer, which ZeRO and torch would move about.
    setattr(module, _BEGAN, (first.detach().clone(), second.detach().clone()))
    return scale * second.float() @ first.float()


def _layers(model: nn.Module, targets: Sequence[str]) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and any(ends_in(name, target) for target in targets):
            yield name, module


def _largest(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    if weight.is_meta:
        rows, columns = weight.shape
        return weight.new_empty(rows, rank), weight.new_empty(rank), weight.new_empty(rank, columns)
    if min(weight.shape) <= _LARGEST_WHOLE:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, values, transposed = torch.svd_lowrank(weight, q=rank, niter=16)
        right = transposed.T
    return left[:, :rank], values[:rank], right[:rank]
