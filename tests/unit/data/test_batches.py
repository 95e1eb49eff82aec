"""Batches as tensors: labels, padding, and counts that no cutting into micro-batches or workers changes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from orchestrator.contents import find_data
from orchestrator.data.batches import MicroBatch, StepBatch, StepBatches, evaluation_batches
from orchestrator.data.order import SampleOrder
from orchestrator.data.part import Preparation
from orchestrator.data.prepare import prepare
from orchestrator.data.rows import PreparedRows
from orchestrator.errors import RecipeError


@pytest.fixture(scope="module")
def rows(shared: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedRows:
    files = find_data("instructions", [str(shared / "instructions" / "alpaca_zh_demo.json")])
    return PreparedRows.open(
        prepare(Preparation("answers", stories, "instructions", files, 256), tmp_path_factory.mktemp("runs"))
    )


def loss_and_count(batch: MicroBatch) -> tuple[float, float]:
    """Summed causal loss of a model that looks at one token only, and torch's own count of what it summed."""
    table = torch.randn(512, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits, labels = table[batch.input_ids[:, :-1]].flatten(0, 1), batch.labels[:, 1:].flatten()
    total = cross_entropy(logits, labels, reduction="sum").item()
    return total, total / cross_entropy(logits, labels).item()


def of_step(rows: PreparedRows, step: int, num_workers: int, micro_batch_size: int) -> list[StepBatch]:
    order = SampleOrder(len(rows), 8, seed=3)
    workers = [StepBatches(rows, order, micro_batch_size, rank, num_workers) for rank in range(num_workers)]
    return [worker.of_step(step) for worker in workers]


def test_labels_are_the_learned_tokens_and_padding_is_on_the_right(rows):
    (batch,) = of_step(rows, 0, 1, 8)
    (micro,) = batch.micro_batches
    assert micro.input_ids.dtype == micro.labels.dtype == torch.int64
    chosen = SampleOrder(len(rows), 8, seed=3).rows_of_step(0)
    for place, index in enumerate(chosen):
        tokens, loss_mask, _ = rows.row(index)
        assert micro.input_ids[place, : len(tokens)].tolist() == tokens.tolist()
        assert micro.labels[place, : len(tokens)].tolist() == np.where(loss_mask, tokens, -100).tolist()
        assert (micro.input_ids[place, len(tokens) :] == 0).all()
        assert (micro.labels[place, len(tokens) :] == -100).all()
    assert micro.input_ids.shape[1] == max(len(rows.row(index).tokens) for index in chosen)
    assert batch.num_tokens == sum(len(rows.row(index).tokens) for index in chosen)


@pytest.mark.parametrize(("num_workers", "micro_batch_size"), [(1, 8), (1, 1), (2, 4), (2, 2), (4, 1)])
def test_the_loss_of_a_step_is_the_same_however_it_is_cut(rows, num_workers, micro_batch_size):
    whole, whole_count = loss_and_count(of_step(rows, 130, 1, 8)[0].micro_batches[0])
    parts = of_step(rows, 130, num_workers, micro_batch_size)
    losses, counts = zip(*(loss_and_count(micro) for part in parts for micro in part.micro_batches), strict=True)
    assert sum(losses) == pytest.approx(whole, rel=1e-12)
    assert sum(counts) == pytest.approx(whole_count)
    for part in parts:
        assert len(part.micro_batches) == 8 // num_workers // micro_batch_size
        # Every worker knows the size of the whole step without asking the others.
        assert part.num_targets == round(whole_count)


def test_a_batch_that_cannot_be_cut_names_the_numbers(rows):
    with pytest.raises(RecipeError, match="global_batch_size 500 is not divisible by micro_batch_size 4 x 8 workers = 32"):
        StepBatches(rows, SampleOrder(len(rows), 500, seed=1), 4, 0, 8)


@pytest.mark.parametrize(("num_workers", "micro_batch_size"), [(1, 64), (3, 7), (7, 16)])
def test_evaluation_sees_every_row_once_in_equally_many_batches(rows, num_workers, micro_batch_size):
    workers = [list(evaluation_batches(rows, micro_batch_size, rank, num_workers)) for rank in range(num_workers)]
    assert len({len(batches) for batches in workers}) == 1
    learned = [(batch.labels[:, 1:] != -100).sum().item() for batches in workers for batch in batches]
    assert sum(learned) == rows.summary.targets
    assert sum((batch.labels != -100).any(dim=1).sum().item() for batches in workers for batch in batches) == len(rows)


def test_a_worker_without_rows_still_takes_part_in_evaluation(rows):
    batches = list(evaluation_batches(rows, 1, len(rows), len(rows) + 1))
    assert len(batches) == 1
    assert (batches[0].labels == -100).all()
    assert batches[0].input_ids.shape == (1, 2)
