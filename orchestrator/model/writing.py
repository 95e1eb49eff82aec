"""How a model goes on with a text, in a way that takes part in training: no cache, and the same on all ranks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def go_on(next_logits: Callable[[Tensor], Tensor], ids: Sequence[int], most: int, end_id: int) -> list[int]:
    """The likeliest token, one after another, up to `most` or the end of the text, which is left out.

    `next_logits` gives the logits [1, vocabulary] of the token after int64 [1, n]. Every token takes a forward over all that
    is there, which under ZeRO-3 all ranks must do alike.
    """
    written: list[int] = []
    for _ in range(most):
        row = torch.tensor([[*ids, *written]])
        token = int(next_logits(row)[0].argmax())
        if token == end_id:
            break
        written.append(token)
    return written
