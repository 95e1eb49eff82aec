"""The order in which rows are learned: a function of seed and step, whatever computes it."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class SampleOrder:
    """Every epoch is a fresh permutation of the rows, and a batch may cross from one into the next."""

    num_rows: int
    global_batch_size: int
    seed: int

    def rows_of_step(self, step: int) -> np.ndarray:
        """int64 [global_batch_size]: the rows that optimizer step `step`, from 0, learns."""
        first = step * self.global_batch_size
        epoch, start = divmod(first, self.num_rows)
        parts = []
        missing = self.global_batch_size
        while missing:
            part = _permutation(self.num_rows, self.seed, epoch)[start : start + missing]
            parts.append(part)
            missing -= len(part)
            epoch, start = epoch + 1, 0
        return np.concatenate(parts)


def deal(costs: np.ndarray, num_hands: int) -> np.ndarray:
    """int64 [hands, rows of each]: as many rows in each hand, of nearly the same cost in all; the dearest hand first.

    Hands are micro-batches. Ranks take theirs at the same time, and wait for the one that takes longest.
    """
    # Dearest first, to the hands in turn and back again.
    rounds = np.argsort(-costs, kind="stable").reshape(-1, num_hands)
    rounds[1::2] = rounds[1::2, ::-1].copy()
    hands = np.sort(rounds.T, axis=1)
    return hands[np.argsort(-costs[hands].sum(1), kind="stable")]


# A batch that crosses an epoch needs two; drawing one anew for every step would cost as much as the step.
@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)
