"""The order of rows: each once per epoch, and the same whoever computes it."""

import random

import numpy as np
import pytest

from orchestrator.data.batches import StepBatch, StepBatches
from orchestrator.data.order import SampleOrder, deal
from orchestrator.data.rows import PreparedRows
from orchestrator.data.summary import Summary


@pytest.mark.parametrize(("num_rows", "global_batch_size"), [(10, 4), (12, 4), (3, 8), (1, 2), (7, 7)])
def test_every_row_comes_exactly_once_per_epoch(num_rows, global_batch_size):
    order = SampleOrder(num_rows, global_batch_size, seed=5)
    stream = np.concatenate([order.rows_of_step(step) for step in range(3 * num_rows)])
    assert len(stream) == 3 * num_rows * global_batch_size
    for epoch in stream.reshape(-1, num_rows):
        assert sorted(epoch) == list(range(num_rows))


def test_epochs_and_seeds_differ():
    order = SampleOrder(100, 100, seed=1)
    epochs = [order.rows_of_step(0), order.rows_of_step(1), SampleOrder(100, 100, seed=2).rows_of_step(0)]
    assert not any(np.array_equal(one, other) for one, other in zip(epochs, [*epochs[1:], epochs[0]], strict=True))


def test_a_step_depends_on_no_step_before_it():
    forwards = [SampleOrder(10, 4, seed=1).rows_of_step(step) for step in range(9)]
    order = SampleOrder(10, 4, seed=1)
    backwards = [order.rows_of_step(step) for step in reversed(range(9))]
    assert all(np.array_equal(one, other) for one, other in zip(forwards, reversed(backwards), strict=True))
    assert forwards[0].dtype == np.int64


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_any_number_of_workers_learns_the_same_global_batch(num_workers):
    rows, order = numbered_rows(10), SampleOrder(10, 8, seed=1)
    for step in range(5):
        workers = [StepBatches(rows, order, 2, rank, num_workers).of_step(step) for rank in range(num_workers)]
        assert np.array_equal(numbers_in(workers), order.rows_of_step(step))


@pytest.mark.parametrize(("num_hands", "each"), [(1, 8), (2, 4), (4, 4), (8, 1), (3, 5)])
def test_hands_are_dealt_as_many_rows_of_nearly_the_same_cost(num_hands: int, each: int) -> None:
    costs = np.random.default_rng(num_hands).integers(500, 1000, num_hands * each)
    hands = deal(costs, num_hands)
    assert hands.shape == (num_hands, each)
    assert sorted(hands.reshape(-1)) == list(range(len(costs)))
    assert all(list(hand) == sorted(hand) for hand in hands)
    sums, as_they_come = (costs[each].sum(1) for each in (hands, np.arange(len(costs)).reshape(hands.shape)))
    # A hand is further from another by no more than two rows can be from each other.
    assert np.ptp(sums) <= np.ptp(costs)
    assert np.ptp(sums) <= np.ptp(as_they_come)


def numbered_rows(num_rows: int) -> PreparedRows:
    """Rows of two or three tokens, of which the first is the row's number."""
    lengths = 2 + np.arange(num_rows) % 2
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.full(offsets[-1], 1000, np.int32)
    tokens[offsets[:-1]] = np.arange(num_rows)
    counts = {"rows": num_rows, "tokens": len(tokens), "targets": len(tokens) - num_rows}
    summary = Summary("next_token", 3, documents=num_rows, characters=1, truncated=0, **counts)
    loss_mask, one_each = np.ones(len(tokens), np.bool_), np.arange(num_rows + 1)
    return PreparedRows(summary, tokens, loss_mask, offsets, (lengths - 1).astype(np.int32), lengths, one_each)


def numbers_in(workers: list[StepBatch]) -> list[int]:
    """Of a global batch, whose micro-batches its workers take in turns."""
    turns = zip(*(worker.micro_batches for worker in workers), strict=True)
    return [number for turn in turns for micro in turn for number in micro.input_ids[:, 0].tolist()]


def divisor(chance: random.Random, number: int) -> int:
    return chance.choice([each for each in range(1, number + 1) if number % each == 0])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("num_rows", "global_batch_size"), [(88, 8), (101, 12), (23, 24), (5, 12)], ids=["whole", "crossing", "long", "longer"]
)
def test_each_sample_is_seen_once_per_epoch_across_any_number_of_restarts(
    num_rows: int, global_batch_size: int, seed: int
) -> None:
    """After a failure it goes on from a checkpoint, with other workers and micro-batches; what counts is what stays."""
    chance, rows, order = random.Random(seed), numbered_rows(num_rows), SampleOrder(num_rows, global_batch_size, seed)
    save_every, num_steps = chance.randint(1, 3), max(20, -(-2 * num_rows // global_batch_size))
    learned: dict[int, list[int]] = {}
    step, restarts = 0, 0
    while step < num_steps:
        num_workers = divisor(chance, global_batch_size)
        micro_batch_size = divisor(chance, global_batch_size // num_workers)
        workers = [StepBatches(rows, order, micro_batch_size, rank, num_workers) for rank in range(num_workers)]
        for _ in range(min(chance.randint(1, 6), num_steps - step)):
            learned[step] = numbers_in([worker.of_step(step) for worker in workers])
            assert len(learned[step]) == global_batch_size
            step += 1
        # Here something fails; what came after the newest checkpoint is learned again.
        if step < num_steps:
            step, restarts = step - step % save_every, restarts + 1
    assert restarts > 2
    stream = np.concatenate([learned[step] for step in range(num_steps)])
    whole_epochs = len(stream) // num_rows
    assert whole_epochs >= 2
    for epoch in stream[: whole_epochs * num_rows].reshape(whole_epochs, num_rows):
        assert sorted(epoch) == list(range(num_rows))
