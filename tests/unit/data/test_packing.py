"""Samples that share rows: none is lost or cut, hardly a position stays empty, and each can be told from the others."""

from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.contents import find_data
from orchestrator.data.batches import IGNORED, StepBatches
from orchestrator.data.order import SampleOrder
from orchestrator.data.packing import packed
from orchestrator.data.part import Preparation
from orchestrator.data.prepare import prepare
from orchestrator.data.rows import PreparedRows
from orchestrator.data.storage import Row

BLOCK = 64


def sample(length: int, number: int) -> Row:
    """Half prompt, half answer; its tokens say which it is."""
    return Row(np.full(length, number, np.int32), np.arange(length) >= length // 2)


def lengths_of(rows: list[Row]) -> list[list[int]]:
    return [np.diff(row.ends, prepend=0).tolist() for row in rows if row.ends is not None]


def test_each_sample_goes_where_it_leaves_the_least_room() -> None:
    samples = [sample(length, number) for number, length in enumerate((10, 50, 40, 14, 24))]
    assert lengths_of(packed(samples, BLOCK)) == [[50, 14], [40, 24], [10]]


def test_none_is_lost_or_cut_and_each_keeps_its_loss() -> None:
    lengths = np.random.default_rng(1).integers(4, BLOCK + 1, 500)
    rows = packed([sample(length, number) for number, length in enumerate(lengths)], BLOCK)
    assert max(len(row.tokens) for row in rows) <= BLOCK
    found = {}
    for row in rows:
        assert row.ends is not None
        for part, mask in zip(np.split(row.tokens, row.ends[:-1]), np.split(row.loss_mask, row.ends[:-1]), strict=True):
            assert len(set(part.tolist())) == 1
            assert mask.tolist() == sample(len(part), 0).loss_mask.tolist()
            found[int(part[0])] = len(part)
    assert found == dict(enumerate(lengths.tolist()))


def test_rows_are_full_for_lengths_as_they_come() -> None:
    lengths = np.random.default_rng(2).lognormal(4.5, 0.7, 2000).astype(int).clip(8, 512)
    rows = packed([sample(length, 1) for length in lengths], 512)
    assert lengths.sum() / (len(rows) * 512) > 0.98


@pytest.fixture(scope="module")
def prepared(shared: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, PreparedRows]:
    """Real instructions, by whether they are packed."""
    files = find_data("instructions", [str(shared / "instructions" / "alpaca_zh_demo.json")])
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for packing in (False, True):
        preparation = Preparation("answers", stories, "instructions", files, block_length=1024, packing=packing)
        made[packing] = PreparedRows.open(prepare(preparation, folder))
    return made


def samples_of(rows: PreparedRows) -> list[tuple[bytes, bytes]]:
    """Tokens and loss of every sample."""
    found = []
    for index in range(len(rows)):
        tokens, loss_mask, ends = rows.row(index)
        assert ends is not None
        assert ends[-1] == len(tokens)
        parts = zip(np.split(tokens, ends[:-1]), np.split(loss_mask, ends[:-1]), strict=True)
        found += [(part.tobytes(), mask.tobytes()) for part, mask in parts]
    return found


def test_real_instructions_are_all_there_in_rows_that_are_full(prepared: dict[bool, PreparedRows]) -> None:
    alone, together = prepared[False], prepared[True]
    assert len(samples_of(alone)) == len(alone) == alone.summary.documents > 900
    assert sorted(samples_of(together)) == sorted(samples_of(alone))
    for count in ("documents", "characters", "tokens", "targets", "truncated"):
        assert getattr(together.summary, count) == getattr(alone.summary, count)
    assert together.summary.fill_rate > 0.98 > 0.6 > alone.summary.fill_rate


def test_what_there_is_is_said_in_a_line(prepared: dict[bool, PreparedRows]) -> None:
    summary = prepared[True].summary
    assert str(summary).startswith(
        f"1,000 instructions, {summary.tokens:,} tokens, {summary.truncated} of them cut to fit; "
    )
    assert str(summary).endswith(f"{summary.rows:,} sequences of 1,024, {100 * summary.fill_rate:.1f}% full")


def test_a_token_sees_those_before_it_in_its_own_sample(prepared: dict[bool, PreparedRows]) -> None:
    alone, together = prepared[False], prepared[True]
    lengths = [len(alone.row(index).tokens) for index in range(len(alone))]
    seen = [place + 1 for length in lengths for place in range(length)]
    assert alone.seen == pytest.approx(sum(seen) / len(seen))
    assert together.seen == pytest.approx(alone.seen)


def test_a_batch_tells_where_each_sample_begins(prepared: dict[bool, PreparedRows]) -> None:
    rows = prepared[True]
    batch = StepBatches(rows, SampleOrder(len(rows), 4, seed=1), 4, rank=0, num_workers=1).of_step(0)
    (micro,) = batch.micro_batches
    assert micro.position_ids is not None
    targets = 0
    for place, index in enumerate(SampleOrder(len(rows), 4, seed=1).rows_of_step(0)):
        row = rows.row(index)
        lengths = np.diff([*row.starts, micro.input_ids.shape[1]])
        assert micro.position_ids[place].tolist() == [position for length in lengths for position in range(length)]
        assert micro.labels[place, row.starts].tolist() == [IGNORED] * len(row.starts)
        targets += rows.num_targets(index)
    assert batch.num_targets == targets == int((micro.labels[:, 1:] != IGNORED).sum())


def test_micro_batches_of_a_step_cost_about_the_same(prepared: dict[bool, PreparedRows]) -> None:
    rows = prepared[True]
    order = SampleOrder(len(rows), 8, seed=1)
    for step in range(3):
        alone = StepBatches(rows, order, 2, 0, 1).of_step(step).micro_batches
        dealt = [int((micro.labels[:, 1:] != IGNORED).sum() + (micro.input_ids != 0).sum()) for micro in alone]
        workers = [StepBatches(rows, order, 2, rank, 2).of_step(step) for rank in range(2)]
        turns = [micro for turn in zip(*(worker.micro_batches for worker in workers), strict=True) for micro in turn]
        assert all(torch.equal(one.input_ids, other.input_ids) for one, other in zip(turns, alone, strict=True))
        of_rows = rows.targets + np.diff(rows.offsets)
        taken = of_rows[order.rows_of_step(step)].reshape(-1, 2).sum(1)
        assert sum(dealt) == taken.sum()
        assert np.ptp(dealt) < np.ptp(taken)
        # So that two ranks take what is nearly alike at the same time.
        assert dealt == sorted(dealt, reverse=True)


def test_a_batch_of_rows_with_one_sample_each_has_no_positions(prepared: dict[bool, PreparedRows]) -> None:
    rows = prepared[False]
    batch = StepBatches(rows, SampleOrder(len(rows), 4, seed=1), 4, rank=0, num_workers=1).of_step(0)
    assert batch.micro_batches[0].position_ids is None
