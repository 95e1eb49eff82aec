"""How much of their rank low-rank factors use: the singular values of each (alpha / rank) B A."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.model.adapters.merging import MergeRule
from orchestrator.model.adapters.names import KEY_PREFIX


@dataclass(frozen=True)
class LayerRank:
    """One adapted layer."""

    layer: str
    singular_values: tuple[float, ...]
    """The largest first."""

    @property
    def rank(self) -> int:
        """Of the factors."""
        return len(self.singular_values)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007): 1 to `rank`."""
        values = torch.tensor(self.singular_values, dtype=torch.float64)
        shares = values / values.sum()
        return float(torch.exp(torch.special.entr(shares).sum()))


def layer_ranks(tensors: Mapping[str, Tensor], rule: MergeRule) -> list[LayerRank]:
    """Of each layer with factors, in the order of the tensors' keys; the weights of the base are not needed."""
    found = []
    for key, first in tensors.items():
        for factors in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if key.endswith(f".{factors[0]}"):
                layer = key.removeprefix(KEY_PREFIX).removesuffix(f".{factors[0]}")
                second = tensors[key.removesuffix(factors[0]) + factors[1]]
                # B A has the singular values of the product of their small triangles.
                left, right = torch.linalg.qr(second.double()).R, torch.linalg.qr(first.double().T).R
                values = torch.linalg.svdvals(left @ right.T) * rule.scale(layer)
                found.append(LayerRank(layer, tuple(values.tolist())))
    return found
