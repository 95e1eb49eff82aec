"""Bottleneck adapters: small networks behind the parts of each block, named as AdapterHub's library names them.

Houlsby et al. 2019 put one behind attention and one behind the MLP, Pfeiffer et al. 2021 behind the MLP alone. PEFT has none
of them, so what is written is AdapterHub's format.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.schema import Bottleneck

NAME = "bottleneck"
"""Of the one adapter of a model."""
_PLACES = {"attention_adapters": "o_proj", "output_adapters": "down_proj"}
"""The layer of a block whose output each adapts, being the last of attention and of the MLP."""
_LOCATIONS = {"houlsby": ("attention_adapters", "output_adapters"), "pfeiffer": ("output_adapters",)}


class _Network(nn.Module):
    """x + up(relu(down(x))) for x [..., hidden]; up begins at zero, so that nothing changes at first."""

    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.adapter_down = nn.Sequential(nn.Linear(hidden, size))
        self.adapter_up = nn.Linear(size, hidden)
        nn.init.zeros_(self.adapter_down[0].get_parameter("bias"))
        nn.init.zeros_(self.adapter_up.weight)
        nn.init.zeros_(self.adapter_up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.adapter_up(torch.relu(self.adapter_down(x)))


class _Location(nn.Module):
    def __init__(self, network: _Network) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict({NAME: network})

    def forward(self, x: Tensor) -> Tensor:
        return self.adapters[NAME](x)


def add_bottlenecks(model: nn.Module, method: Bottleneck, seed: int) -> None:
    """Puts the networks, random by `seed`, behind the parts of every block, in the precision of the embedding."""
    embedding = model.get_submodule("model.embed_tokens").get_parameter("weight")
    torch.manual_seed(seed)
    for block in _blocks(model):
        for location in _LOCATIONS[method.placement]:
            network = _Network(embedding.shape[-1], method.size).to(embedding.device, embedding.dtype)
            block.add_module(location, _Location(network))
            _last_layer(block, location).register_forward_hook(_adapting(block.get_submodule(location)))


def is_bottleneck(parameter: str) -> bool:
    """Whether a parameter of that name belongs to one."""
    return f".adapters.{NAME}." in parameter


def bottleneck_kind(parameter: str) -> str:
    """Such as output_adapters, of a parameter that belongs to one."""
    return parameter.partition(f".adapters.{NAME}.")[0].rsplit(".", 1)[-1]


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    blocks = model.get_submodule("model.layers")
    assert isinstance(blocks, nn.ModuleList)
    yield from blocks


def _last_layer(block: nn.Module, location: str) -> nn.Module:
    name = _PLACES[location]
    (found,) = [module for each, module in block.named_modules() if each.rsplit(".", 1)[-1] == name]
    return found


def _adapting(network: nn.Module) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A forward hook that hands a layer's output through a network."""
    return lambda _module, _arguments, output: network(output)
