"""The loss: cross-entropy of the next token, summed over the positions that carry loss."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from orchestrator.model.attention import span_arguments
from orchestrator.model.prompts import NAME as PROMPTS
from orchestrator.model.prompts import Prompts
from orchestrator.model.subspace import NAME as SUBSPACE
from orchestrator.model.subspace import SubspaceModule

IGNORED = -100
"""The label of a position without loss."""

_MOST_LOGITS = 1 << 28
"""Of one piece of a micro-batch. Beyond that the backward computes them again, piece by piece."""
_FP32_LOGITS = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Held in fp32 at once: on a CPU as many as its cache holds, on a GPU enough to keep it busy."""


class SummedLoss(nn.Module):
    """A causal language model whose forward gives its loss.

    forward(input_ids [m, n] int64, labels [m, n] int64, IGNORED where there is no loss, position_ids [m, n] int64 or None)
    returns the fp32 sum, in nats, over targets. Without labels it returns the logits [m, vocabulary] of the token that comes
    after each row. The caller divides by the targets of the whole global batch, so that
    neither accumulation nor the number of workers changes the loss. Where positions begin again a sample begins, which
    sees nothing of those before it in its row.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model: Any = model
        self._is_moved = False
        """Whether the weights are where the coordinates of a subspace take them."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        subspace: SubspaceModule | None = getattr(self.model, SUBSPACE, None)
        if subspace is None or self._is_moved:
            return self._forward(input_ids, labels, position_ids)
        self._is_moved = True
        try:
            weights = {f"model.{name}": weight for name, weight in subspace.weights(self.model).items()}
            return functional_call(self, weights, (input_ids, labels, position_ids))
        finally:
            self._is_moved = False

    def _forward(self, input_ids: Tensor, labels: Tensor | None, position_ids: Tensor | None) -> Tensor:
        # No mask and no cache: rows are padded on the right, where a causal model never looks, and with either of them
        # transformers would not see that positions begin again.
        prompts = self._prompts
        if prompts and not prompts.is_left_out:
            if position_ids is not None:
                raise ValueError("virtual tokens stand before a row, which must hold one sample")
            return self._of_hidden(prompts(self.model.model, input_ids), labels)
        samples = {} if position_ids is None else {"position_ids": position_ids, **span_arguments(self.model, position_ids)}
        return self._of_hidden(self.model.model(input_ids=input_ids, use_cache=False, **samples).last_hidden_state, labels)

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        """Without virtual tokens, where there are any."""
        prompts = self._prompts
        if prompts:
            prompts.is_left_out = True
        try:
            yield
        finally:
            if prompts:
                prompts.is_left_out = False

    @property
    def _prompts(self) -> Prompts | None:
        return getattr(self.model, PROMPTS, None)

    def _of_hidden(self, states: Tensor, labels: Tensor | None) -> Tensor:
        """Of hidden states [m, n, hidden]."""
        if labels is None:
            return self.model.lm_head(states[:, -1])
        hidden, targets = states[:, :-1], labels[:, 1:]
        chosen = targets != IGNORED
        # Only positions that carry loss reach the head, whose logits are the largest tensor of a step.
        return summed_cross_entropy(self.model.lm_head, hidden[chosen], targets[chosen])


def summed_cross_entropy(head: Any, hidden: Tensor, targets: Tensor, most_logits: int = _MOST_LOGITS) -> Tensor:
    """The fp32 sum, in nats, of the cross-entropy of head(hidden [n, h]) with targets [n] int64.

    The head is a linear layer, and called as a module: it may have LoRA or a bias, or be quantized. Its logits are never
    held in fp32 as a whole; where there are more than `most_logits` of them, not in its own precision either.
    """
    rows = max(1, most_logits // head.out_features)
    if len(hidden) <= rows:
        return _SummedCrossEntropy.apply(head(hidden), targets)
    total = torch.zeros((), device=hidden.device)
    for part, aims in zip(hidden.split(rows), targets.split(rows), strict=True):
        total = total + checkpoint(lambda x, y: _SummedCrossEntropy.apply(head(x), y), part, aims, use_reentrant=False)
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    """Of logits [n, v] in any precision and targets [n]. The logits become their own gradient, in the same memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        normalizers = torch.empty(len(logits), device=logits.device)
        total = torch.zeros((), device=logits.device)
        for rows in _blocks(logits):
            block = logits[rows].float()
            torch.logsumexp(block, 1, out=normalizers[rows])
            total += (normalizers[rows] - block.gather(1, targets[rows, None])[:, 0]).sum()
        ctx.logits, ctx.targets, ctx.normalizers = logits, targets, normalizers
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (scale,) = gradients
        if ctx.logits is None:
            raise RuntimeError("this loss gives its gradient once; its logits are gone")
        logits, targets, normalizers = ctx.logits, ctx.targets, ctx.normalizers
        ctx.logits = None
        for rows in _blocks(logits):
            block = (logits[rows].float() - normalizers[rows, None]).exp_()
            block.scatter_add_(1, targets[rows, None], -torch.ones_like(block[:, :1]))
            # Scaled before it is rounded, or small gradients would be lost in fp16.
            logits[rows] = block.mul_(scale)
        return logits, None


def _blocks(logits: Tensor) -> list[slice]:
    """Of rows, so small that their fp32 copies cost little."""
    size = max(1, _FP32_LOGITS.get(logits.device.type, _FP32_LOGITS["cuda"]) // logits.shape[1])
    return [slice(first, first + size) for first in range(0, len(logits), size)]


def held_out_numbers(nats: float, targets: int, characters: int, text_bytes: int) -> dict[str, float]:
    """A summed loss as others say it: nats and perplexity by token, and bits by character and by byte of UTF-8, which
    compare across tokenizers."""
    loss, bits = nats / targets, nats / math.log(2)
    return {
        "loss": loss,
        # Beyond e^700 there is no float.
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_character": bits / characters,
        "bits_per_byte": bits / text_bytes,
    }
