"""PiSSA: factors that begin as the largest singular vectors of a weight, which are taken out of it.

The base on disk stays what it is. So what is written holds the difference, the factors as they are now beside those that
they began as: twice the rank, and PEFT loads it as plain LoRA.
"""

from collections.abc import Iterator, Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from orchestrator.model.adapters.names import ADAPTER
from orchestrator.plan.targets import ends_in

_BEGAN = "began_as"
_LARGEST_WHOLE = 1024
"""Of a weight's shorter side, whose singular vectors are computed exactly; beyond that as closely as 16 iterations come."""


@torch.no_grad()
def take_out(model: nn.Module, targets: Sequence[str]) -> None:
    """Lets the targets' factors begin with W's largest singular vectors, and leaves W - (alpha / rank) B A in its place."""
    for module in _layers(model, targets):
        weight = module.get_base_layer().get_parameter("weight")
        first, second = (factors[ADAPTER].get_parameter("weight") for factors in (module.lora_A, module.lora_B))
        scale = module.scaling[ADAPTER]
        left, values, right = _largest(weight.float(), len(first))
        root = (values / scale).sqrt()
        second.copy_(left * root)
        first.copy_(root[:, None] * right)
        weight.copy_(weight.float() - scale * second.float() @ first.float())
        # No buffer, which ZeRO and torch would move about.
        setattr(module, _BEGAN, (first.detach().clone(), second.detach().clone()))


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


def _layers(model: nn.Module, targets: Sequence[str]) -> Iterator[LoraLayer]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and any(ends_in(name, target) for target in targets):
            yield module


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
