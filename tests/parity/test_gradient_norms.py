"""The norm of each parameter's gradient, which a stage's first steps are judged by, is the same wherever its parts lie."""

import math
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed import run_on_ranks
from tests.parity.tiny_run import LEARNING_RATE, Precision, TinyRun, tiny_engine

pytestmark = pytest.mark.slow

PRECISIONS: tuple[Precision, ...] = ("bf16", "fp32")
LEVELS = (0, 1, 2, 3)
TOLERANCE = {"bf16": 4e-3, "fp32": 1e-5}


def inspected(runs: list[TinyRun]) -> list[tuple[dict[str, float], float]]:
    """Of each run the norms of its first step, and that of them all."""
    found = []
    for run in runs:
        engine, batches = tiny_engine(run), run.batches(dist.get_rank(), dist.get_world_size())
        result = engine.step(batches.of_step(0), LEARNING_RATE, 0, inspect=True)
        found.append((result.gradient_norms, result.gradient_norm))
    return found


@pytest.fixture(scope="module")
def norms(base: Path, text_rows: Path) -> dict[tuple[str, int, int], tuple[dict[str, float], float]]:
    """By precision, ZeRO level and number of ranks."""
    found = {}
    for ranks in (1, 2):
        runs = [TinyRun(base, text_rows, precision, zero=zero) for precision in PRECISIONS for zero in LEVELS]
        made = run_on_ranks(inspected, ranks, runs)
        found |= {(run.precision, run.zero, ranks): each for run, each in zip(runs, made, strict=True)}
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("zero", LEVELS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_they_are_those_of_the_whole_gradients(norms, precision, zero, ranks):
    mine, total = norms[precision, zero, ranks]
    assert math.hypot(*mine.values()) == pytest.approx(total, rel=TOLERANCE[precision])
    expected, _ = norms["fp32", 0, 1]
    assert mine.keys() == expected.keys()
    # Factors of LoRA whose other factor is zero have none.
    assert {name for name, norm in mine.items() if norm == 0} == {name for name, norm in expected.items() if norm == 0}
    if precision == "fp32":
        assert mine == pytest.approx(expected, rel=TOLERANCE[precision])
