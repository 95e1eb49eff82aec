"""The order of rows: each once per epoch, and the same whoever computes it."""

import numpy as np
import pytest

from orchestrator.data.order import SampleOrder
from orchestrator.errors import RecipeError


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
    order = SampleOrder(10, 8, seed=1)
    for step in range(5):
        shares = [order.rows_of_rank(step, rank, num_workers) for rank in range(num_workers)]
        assert np.array_equal(np.concatenate(shares), order.rows_of_step(step))


def test_a_batch_that_cannot_be_shared_names_both_numbers():
    with pytest.raises(RecipeError, match="global_batch_size 500 is not divisible by 8 workers"):
        SampleOrder(10, 500, seed=1).rows_of_rank(0, 0, 8)
