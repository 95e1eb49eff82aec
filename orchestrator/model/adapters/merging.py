"""How an adapter's tensors and the base's weight make one weight."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from orchestrator.model.adapters.names import KEY_PREFIX, ROWS_NAME, SCALES


@dataclass(frozen=True)
class MergeRule:
    """What its `adapter_config.json` says of the scale of LoRA's factors."""

    config: PeftConfig

    def scale(self, layer: str) -> float:
        """alpha / rank, or alpha / sqrt(rank)."""
        config = self.config
        assert isinstance(config, LoraConfig)
        ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
        rank = ranks.get(get_pattern_key(list(ranks), layer), config.r)
        alpha = alphas.get(get_pattern_key(list(alphas), layer), config.lora_alpha)
        return alpha / (rank**0.5 if config.use_rslora else rank)

    def merged(self, name: str, tensor: Tensor, adapter: Mapping[str, Tensor], unused: set[str]) -> Tensor:
        """The base's tensor of that name with all that the adapter has for it, in its own dtype; the sum is made in fp32.

        `adapter` is by `plain_key`; what is used of it is taken out of `unused`.
        """
        layer, last = name.rsplit(".", 1)

        def found(part: str) -> Tensor | None:
            key = KEY_PREFIX + part
            unused.discard(key)
            return adapter.get(key)

        if (whole := found(name)) is not None:
            return whole.to(tensor.dtype)
        if last == "weight" and (rows := found(f"{layer}.{ROWS_NAME}")) is not None:
            return torch.cat([tensor[: len(tensor) - len(rows)], rows.to(tensor.dtype)])
        if (scales := found(f"{layer}.{SCALES}")) is not None:
            return _scaled(tensor, scales, is_bias=last == "bias")
        if last != "weight":
            return tensor
        if (change := self._change(layer, found)) is None:
            return tensor
        weight = tensor.float() + change
        if (magnitude := found(f"{layer}.lora_magnitude_vector")) is not None:
            weight *= (magnitude.float() / weight.norm(dim=1))[:, None]
        return weight.to(tensor.dtype)

    def _change(self, layer: str, found: Callable[[str], Tensor | None]) -> Tensor | None:
        """(alpha / rank) B A; an embedding's table is the transpose."""
        first, second = found(f"{layer}.lora_A.weight"), found(f"{layer}.lora_B.weight")
        if first is not None and second is not None:
            return second.float() @ first.float() * self.scale(layer)
        first, second = found(f"{layer}.lora_embedding_A"), found(f"{layer}.lora_embedding_B")
        if first is not None and second is not None:
            return (second.float() @ first.float()).T * self.scale(layer)
        return None


def _scaled(tensor: Tensor, scales: Tensor, is_bias: bool) -> Tensor:
    """Scales are [out, 1], or [1, in] of a layer whose input is scaled, whose bias stays."""
    if is_bias:
        return tensor if scales.shape[0] == 1 else (tensor.float() * scales.float()[:, 0]).to(tensor.dtype)
    return (tensor.float() * scales.float()).to(tensor.dtype)


def merge_rule(config: PeftConfig) -> MergeRule:
    return MergeRule(config)


def read_merge_rule(folder: Path) -> MergeRule:
    """Of an adapter that was written."""
    return MergeRule(PeftConfig.from_pretrained(str(folder)))
