"""Prepared rows as training reads them: mapped from disk, so that a corpus takes no memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from orchestrator.data.storage import ARRAYS, Row
from orchestrator.data.summary import Summary, read_summary
from orchestrator.errors import DataError


@dataclass(frozen=True)
class PreparedRows:
    """The rows of one prepared data folder."""

    summary: Summary
    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    targets: np.ndarray
    """int32 [rows]: the positions with loss in each row."""
    sample_ends: np.ndarray
    sample_offsets: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Maps a folder that `prepare` made; raises DataError when it is incomplete."""
        summary = read_summary(folder)
        if summary is None:
            raise DataError(f"{folder} is no complete prepared data; delete it, and the next run prepares it again")
        arrays = {name.removesuffix(".npy"): np.load(folder / name, mmap_mode="r") for name in ARRAYS}
        return cls(summary, **arrays)

    def __len__(self) -> int:
        return self.summary.rows

    @property
    def are_packed(self) -> bool:
        """Whether any row holds several samples."""
        return len(self.sample_ends) > len(self)

    @property
    def characters(self) -> int:
        return self.summary.characters

    def row(self, index: int) -> Row:
        """Tokens int32 [n], loss mask bool [n] and the ends of its samples."""
        place = slice(self.offsets[index], self.offsets[index + 1])
        samples = slice(self.sample_offsets[index], self.sample_offsets[index + 1])
        return Row(self.tokens[place], self.loss_mask[place], self.sample_ends[samples])

    @property
    def seen(self) -> float:
        """Tokens of its own sample that a token sees, itself among them, on average."""
        lengths = np.diff(self.sample_ends, prepend=0).astype(np.float64)
        firsts = self.sample_offsets[:-1]
        lengths[firsts] = self.sample_ends[firsts]
        return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())

    def num_targets(self, index: int) -> int:
        return int(self.targets[index])
