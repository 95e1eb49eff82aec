"""Rows as tensors: what a device takes through the model at once, and what a whole step amounts to."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from orchestrator.data.order import SampleOrder, deal
from orchestrator.data.rows import PreparedRows
from orchestrator.data.storage import Row
from orchestrator.errors import RecipeError

IGNORED = -100
"""The label of a token that carries no loss, as torch's cross-entropy knows it."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows for one forward and backward, padded on the right to the longest of them.

    A causal model never looks to the right, so the padding needs no attention mask. It counts to the last sample.
    """

    input_ids: torch.Tensor
    """int64 [rows, tokens]."""
    labels: torch.Tensor
    """int64 [rows, tokens], not shifted: the token itself where it carries loss, else -100, as at the begin of a sample."""
    position_ids: torch.Tensor | None = None
    """int64 [rows, tokens], from 0 in each sample; None where every row is one sample."""

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Tokens, labels and positions, there."""
        positions = None if self.position_ids is None else self.position_ids.to(device)
        return self.input_ids.to(device), self.labels.to(device), positions


@dataclass(frozen=True)
class StepBatch:
    """One worker's share of an optimizer step, and the size of the whole step."""

    micro_batches: tuple[MicroBatch, ...]
    num_targets: int
    """Positions with loss in the global batch. Dividing the summed loss by it gives every token the same weight,
    however the batch is cut into micro-batches and workers."""
    num_tokens: int
    """Tokens in the global batch, without padding."""


@dataclass(frozen=True)
class StepBatches:
    """The batches of a training run, for one worker of several."""

    rows: PreparedRows
    order: SampleOrder
    micro_batch_size: int
    rank: int
    num_workers: int

    def __post_init__(self) -> None:
        at_once = self.micro_batch_size * self.num_workers
        if self.order.global_batch_size % at_once:
            raise RecipeError(
                f"global_batch_size {self.order.global_batch_size:,} is not divisible by "
                f"micro_batch_size {self.micro_batch_size} x {self.num_workers} workers = {at_once}"
            )

    def of_step(self, step: int) -> StepBatch:
        """The batch of optimizer step `step`, from 0."""
        everyone = self.order.rows_of_step(step)
        targets = self.rows.targets[everyone].astype(np.int64)
        tokens = self.rows.offsets[everyone + 1] - self.rows.offsets[everyone]
        parts = everyone.reshape(-1, self.micro_batch_size)
        if self.rows.are_packed:
            # The same micro-batches on any number of workers. What is not packed is padded, and costs what its longest does.
            parts = everyone[deal(tokens + targets, len(parts))]
        # In turns: those that are alike are taken at the same time.
        mine = parts[self.rank :: self.num_workers]
        return StepBatch(
            micro_batches=tuple(micro_batch([self.rows.row(index) for index in part]) for part in mine),
            num_targets=int(targets.sum()),
            num_tokens=int(tokens.sum()),
        )


def evaluation_batches(rows: PreparedRows, micro_batch_size: int, rank: int, num_workers: int) -> Iterator[MicroBatch]:
    """Every row once over all workers, in the same number of micro-batches for each.

    A worker whose rows are spent gets one that is all padding: under ZeRO-3 every forward takes all workers.
    """
    mine = range(rank, len(rows), num_workers)
    most = -(-len(rows) // num_workers)
    for first in range(0, most, micro_batch_size):
        part = [rows.row(index) for index in mine[first : first + micro_batch_size]]
        yield micro_batch(part or [_without_loss(rows.row(0))])


def largest_micro_batch(rows: PreparedRows, micro_batch_size: int) -> MicroBatch:
    """Of those that may come, the one that takes most memory: its rows are the longest, with the most targets."""
    lengths = np.diff(rows.offsets)
    order = np.lexsort((rows.targets, lengths))[::-1]
    return micro_batch([rows.row(int(index)) for index in order[:micro_batch_size]])


def micro_batch(rows: list[Row]) -> MicroBatch:
    """Rows side by side."""
    shape = (len(rows), max(len(row.tokens) for row in rows))
    input_ids = np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    positions = np.tile(np.arange(shape[1]), (shape[0], 1))
    for place, row in enumerate(rows):
        input_ids[place, : len(row.tokens)] = row.tokens
        labels[place, : len(row.tokens)] = np.where(row.loss_mask, row.tokens, IGNORED)
        labels[place, row.starts] = IGNORED
        for start in row.starts[1:]:
            positions[place, start:] = np.arange(shape[1] - start)
    are_packed = any(len(row.starts) > 1 for row in rows)
    return MicroBatch(
        torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(positions) if are_packed else None
    )


def _without_loss(row: Row) -> Row:
    return Row(row.tokens[:2], np.zeros(2, np.bool_))
