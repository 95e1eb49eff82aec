"""What the embedding and output rows of new tokens start as.

Never transformers' own resize: its new rows differ by 6e-7 where old ones differ by 2e-2, and it takes minutes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from orchestrator.store import sha256_value
from orchestrator.vocabulary.pieces import NORMAL, ModelProto, piece_processor

NewRows = Literal["mean_of_pieces", "mean", "normal"]


def pieces_of_new_tokens(base: ModelProto, merged: ModelProto, pad_token: str | None) -> list[list[int]]:
    """For each token behind the base's, the base's ids for its text, bytes included; none for tokens that are no text."""
    encode = piece_processor(base).encode
    new = merged.pieces[len(base.pieces) :]
    return [encode(piece.piece) if piece.type == NORMAL and piece.piece != pad_token else [] for piece in new]


def new_rows(old: Tensor, parts: Sequence[Sequence[int]], how: NewRows, seed: int, standard_deviation: float) -> Tensor:
    """One row for each of `parts`, [len(parts), d], in the dtype of `old` [V, d], computed in fp32.

    A token without parts gets the mean of all old rows. `standard_deviation` is that of `normal`.
    """
    if how == "normal":
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(len(parts), old.shape[1], generator=generator) * standard_deviation).to(old.dtype)
    rows = torch.empty(len(parts), old.shape[1], dtype=old.dtype)
    rows[:] = old.mean(dim=0, dtype=torch.float32)
    if how == "mean_of_pieces":
        for row, part in zip(rows, parts, strict=True):
            if part:
                row.copy_(old[list(part)].float().mean(dim=0))
    return rows


@dataclass(frozen=True)
class Growth:
    """How a matrix with a row for each token grows: called with the tensor's name and the matrix, gives the larger one."""

    base_tokens: int
    parts: Sequence[Sequence[int]]
    how: NewRows
    seed: int
    standard_deviation: float
    pad_to_multiple: int

    @property
    def tokens(self) -> int:
        return self.base_tokens + len(self.parts)

    def __call__(self, name: str, matrix: Tensor) -> Tensor:
        """Old rows as they are, a row for each new token, the base's own padding, and means up to the multiple."""
        old, padding = matrix[: self.base_tokens], matrix[self.tokens :]
        # Embedding and head draw different numbers.
        seed = int(sha256_value([self.seed, name])[:15], 16)
        new = new_rows(old, self.parts, self.how, seed, self.standard_deviation)
        missing = -(self.tokens + len(padding)) % self.pad_to_multiple
        more_padding = new_rows(old, [[]] * missing, "mean", seed, self.standard_deviation)
        return torch.cat([old, new, padding, more_padding])
