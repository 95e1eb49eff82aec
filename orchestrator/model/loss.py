"""The loss: cross-entropy of the next token, summed over the positions that carry loss."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

IGNORED = -100
"""The label of a position without loss."""


class SummedLoss(nn.Module):
    """A causal language model whose forward gives its loss.

    forward(input_ids [m, n] int64, labels [m, n] int64, IGNORED where there is no loss) returns the fp32 sum, in nats,
    over targets. The caller divides by the targets of the whole global batch, so that neither accumulation nor the
    number of workers changes the loss.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        # No mask and no cache: rows are padded on the right, where a causal model never looks.
        hidden = self.model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        chosen = targets != IGNORED
        # Only positions that carry loss reach the head, whose logits are the largest tensor of a step.
        logits = self.model.lm_head(hidden[chosen])
        return F.cross_entropy(logits.float(), targets[chosen], reduction="sum")


def bits_per_character(nats: float, characters: int) -> float:
    """A loss that compares across tokenizers: summed nats over the characters they cover, in bits."""
    return nats / (characters * 0.6931471805599453)
