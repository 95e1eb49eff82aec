"""Causal attention on a CPU, of rows that hold one sample or several.

torch's own kernel there computes a packed row as one, or takes a mask of all pairs; and in bf16 its backward takes twice as
long as plain matrix products (docs/decisions.md). Here queries are taken in blocks, and a block's keys end where it ends.
Scores and softmax are fp32, as in that kernel; memory is tokens x sample length, which is why GPUs have another way.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "cpu_blocks"
_BLOCK = 128
"""Queries at once."""

Spans = Sequence[tuple[slice, slice]]
"""Samples, by the rows and the tokens that they have; a sample attends to itself alone."""


def use_cpu_attention(model: PreTrainedModel) -> None:
    """Has a model that computes on a CPU attend in this way. Calls that bring a mask or dropout go to torch's kernel."""
    AttentionInterface.register(_NAME, _attention)
    # Without one of its name no mask is ever made, and a window is forgotten. Where being causal is enough, it makes none.
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)


def span_arguments(model: PreTrainedModel, position_ids: Tensor) -> dict[str, Spans]:
    """What a model's forward is given beside positions that begin again in a row; nothing where their mask is enough."""
    if model.config._attn_implementation != _NAME:
        return {}
    spans = []
    for row, positions in enumerate(position_ids):
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
        spans += [(slice(row, row + 1), slice(first, end)) for first, end in pairwise(starts)]
    return {"spans": spans}


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, spans: Spans | None = None) -> Tensor:
    """softmax(scale x query key^T) value, causal; each [rows, heads, tokens, size], and so is what comes out.

    Without `spans` each row is one sample. Positions in none of them come out as zero.
    """
    return _Attention.apply(query, key, value, scale, spans or [(slice(None), slice(0, query.shape[2]))])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, spans: Spans) -> Tensor:
        out, chances = torch.zeros_like(query), []
        for rows, queries, keys in _blocks(spans):
            scores = (query[rows, :, queries].float() * scale) @ key[rows, :, keys].float().transpose(-1, -2)
            # Only among the queries' own places is there something ahead of them.
            scores[..., queries.start - keys.start :].masked_fill_(_ahead(queries.stop - queries.start), -torch.inf)
            chance = scores.softmax(-1).to(query.dtype)
            out[rows, :, queries] = chance @ value[rows, :, keys]
            chances.append(chance)
        ctx.save_for_backward(query, key, value, *chances)
        ctx.scale, ctx.spans = scale, spans
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        query, key, value, *chances = ctx.saved_tensors
        to_query, to_key, to_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for (rows, queries, keys), chance in zip(_blocks(ctx.spans), chances, strict=True):
            mine = gradient[rows, :, queries]
            to_value[rows, :, keys] += chance.transpose(-1, -2) @ mine
            to_chance = mine @ value[rows, :, keys].transpose(-1, -2)
            to_scores = torch._softmax_backward_data(to_chance, chance, -1, chance.dtype).mul_(ctx.scale)
            to_query[rows, :, queries] = to_scores @ key[rows, :, keys]
            to_key[rows, :, keys] += to_scores.transpose(-1, -2) @ query[rows, :, queries]
        return to_query, to_key, to_value, None, None


def _blocks(spans: Spans) -> Iterator[tuple[slice, slice, slice]]:
    """Rows, queries, and the keys that these see or might see."""
    for rows, tokens in spans:
        for first in range(tokens.start, tokens.stop, _BLOCK):
            end = min(first + _BLOCK, tokens.stop)
            yield rows, slice(first, end), slice(tokens.start, end)


@cache
def _ahead(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).triu_(1)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    spans: Spans | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it; what comes out is [rows, tokens, heads, size]."""
    window, tokens = more.get("sliding_window"), query.shape[2]
    is_plain = tokens == key.shape[2] and not dropout and not (window and window < tokens)
    if not is_plain or (spans is None and attention_mask is not None):
        # With `spans` the mask says the same, from positions that begin again.
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = attend(query, key, value, scaling if scaling is not None else query.shape[-1] ** -0.5, spans)
    return out.transpose(1, 2).contiguous(), None
