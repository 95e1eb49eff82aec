"""The order in which rows are learned: a function of seed and step, whatever computes it."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from orchestrator.errors import RecipeError


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

    def rows_of_rank(self, step: int, rank: int, num_workers: int) -> np.ndarray:
        """The slice of a step's rows that one worker learns; RecipeError when they cannot be shared evenly."""
        if self.global_batch_size % num_workers:
            raise RecipeError(f"global_batch_size {self.global_batch_size:,} is not divisible by {num_workers} workers")
        share = self.global_batch_size // num_workers
        return self.rows_of_step(step)[rank * share : (rank + 1) * share]


# A batch that crosses an epoch needs two; drawing one anew for every step would cost as much as the step.
@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)
