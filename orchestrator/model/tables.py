"""Embedding and head of which only the last rows learn: those of the tokens that were added.

PEFT copies the whole table in every forward to do this. Here it is two parameters, of which the first is frozen: no
gradient, no master and no moments for the rows that stay, and no copy.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OLD_ROWS, NEW_ROWS = "old_rows", "new_rows"
"""Names of the two parameters."""


def split_table(model: nn.Module, name: str, first_new_row: int) -> None:
    """Puts a table that is split before `first_new_row` in the place of the module of that name."""
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(name)
    kind = _SplitHead if isinstance(module, nn.Linear) else _SplitEmbedding
    setattr(model.get_submodule(parent), last, kind(model.get_parameter(f"{name}.weight"), first_new_row))


class _SplitTable(nn.Module):
    """A table of [rows, hidden], as two parameters."""

    def __init__(self, weight: Tensor, first_new_row: int) -> None:
        super().__init__()
        assert 0 < first_new_row < len(weight), f"no row to split {len(weight)} at: {first_new_row}"
        # The old rows stay where they are; only the new ones get memory of their own.
        self.old_rows = nn.Parameter(weight.detach()[:first_new_row], requires_grad=False)
        self.new_rows = nn.Parameter(weight.detach()[first_new_row:].clone())
        self.num_rows, self.num_old = len(weight), first_new_row


class _SplitEmbedding(_SplitTable):
    """ids [...] to rows [..., hidden]."""

    def forward(self, input_ids: Tensor) -> Tensor:
        old = F.embedding(input_ids.clamp(max=self.num_old - 1), self.old_rows)
        new = F.embedding((input_ids - self.num_old).clamp(min=0), self.new_rows)
        return torch.where((input_ids < self.num_old).unsqueeze(-1), old, new)


class _SplitHead(_SplitTable):
    """hidden [..., hidden] to logits [..., rows]."""

    @property
    def out_features(self) -> int:
        return self.num_rows

    def forward(self, hidden: Tensor) -> Tensor:
        return _Logits.apply(hidden, self.old_rows, self.new_rows)


class _Logits(torch.autograd.Function):
    """Both products go where they belong, since putting them together afterwards would hold the logits twice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, old: Tensor, new: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, old, new)
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = torch.empty(len(rows), len(old) + len(new), dtype=hidden.dtype, device=hidden.device)
        torch.mm(rows, old.T, out=logits[:, : len(old)])
        torch.mm(rows, new.T, out=logits[:, len(old) :])
        return logits.view(*hidden.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        hidden, old, new = ctx.saved_tensors
        rows = hidden.reshape(-1, hidden.shape[-1])
        gradient = gradients[0].reshape(len(rows), -1)
        of_old, of_new = gradient[:, : len(old)], gradient[:, len(old) :]
        to_hidden = torch.addmm(of_old @ old, of_new, new)
        return to_hidden.view_as(hidden), None, of_new.T @ rows
