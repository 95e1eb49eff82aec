"""How a global batch is cut into micro-batches, accumulation and ranks changes no loss."""

from pathlib import Path

import pytest

from orchestrator.data.batches import MicroBatch
from orchestrator.model.loss import IGNORED, SummedLoss
from tests.distributed import run_on_ranks
from tests.parity.tiny_run import Curve, Precision, TinyRun, engine_curves, tiny_model

pytestmark = pytest.mark.slow

GLOBAL_BATCH_SIZE = 4
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp32")
CUTS = {1: (4, 2, 1), 2: (2, 1)}
"""Micro-batch sizes by number of ranks; what is missing to the global batch is accumulated."""
OTHER_CUTS = [(1, 2), (1, 1), (2, 2), (2, 1)]

# Measured over six steps: losses differ by up to 5.8e-4 and norms by 1.2e-3 of themselves in bf16; by 1e-6 and 1e-7 in fp32.
LOSS_TOLERANCE = {"bf16": 1.5e-3, "fp32": 1e-5}
NORM_TOLERANCE = {"bf16": 3e-3, "fp32": 1e-5}


@pytest.fixture(scope="module")
def rows(text_rows: Path, answer_rows: Path) -> dict[str, Path]:
    return {"next_token": text_rows, "answers": answer_rows}


@pytest.fixture(scope="module")
def curves(base: Path, rows: dict[str, Path]) -> dict[tuple[str, str, int, int], Curve]:
    """By objective, precision, ranks and micro-batch size."""
    found = {}
    for ranks, sizes in CUTS.items():
        keys = [(objective, precision, size) for objective in rows for precision in PRECISIONS for size in sizes]
        runs = [TinyRun(base, rows[objective], precision, GLOBAL_BATCH_SIZE, size) for objective, precision, size in keys]
        made = run_on_ranks(engine_curves, ranks, runs)
        found |= {(*key[:2], ranks, key[2]): curve for key, curve in zip(keys, made, strict=True)}
    return found


@pytest.mark.parametrize(("ranks", "micro_batch_size"), OTHER_CUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("objective", ["next_token", "answers"])
def test_a_step_is_the_same_however_it_is_cut(curves, objective, precision, ranks, micro_batch_size):
    whole_losses, whole_norms = zip(*curves[objective, precision, 1, GLOBAL_BATCH_SIZE], strict=True)
    losses, norms = zip(*curves[objective, precision, ranks, micro_batch_size], strict=True)
    assert losses == pytest.approx(whole_losses, rel=0, abs=LOSS_TOLERANCE[precision])
    assert norms == pytest.approx(whole_norms, rel=NORM_TOLERANCE[precision])


def test_averaging_each_micro_batch_by_itself_would_be_seen(base, answer_rows, curves):
    batch = TinyRun(base, answer_rows, "fp32", GLOBAL_BATCH_SIZE, 1).batches(rank=0, num_workers=1).of_step(0)
    model = SummedLoss(tiny_model(base, "fp32"))
    sums = [model(micro.input_ids, micro.labels).item() for micro in batch.micro_batches]
    averages = [total / _num_targets(micro) for total, micro in zip(sums, batch.micro_batches, strict=True)]
    loss, _ = curves["answers", "fp32", 1, 1][0]
    assert loss == pytest.approx(sum(sums) / batch.num_targets, abs=LOSS_TOLERANCE["fp32"])
    assert abs(sum(averages) / len(averages) - loss) > 5 * LOSS_TOLERANCE["bf16"]


def _num_targets(micro: MicroBatch) -> int:
    return int((micro.labels[:, 1:] != IGNORED).sum())
