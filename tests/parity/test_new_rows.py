"""Where only the new rows of embedding and head learn, every ZeRO level does the same, and goes on from another's state."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist

from orchestrator.engine import Engine, EngineSettings
from orchestrator.model.adapters import attach
from orchestrator.model.loading import load_model
from orchestrator.model.loss import SummedLoss
from orchestrator.plan.adaptation import Adaptation
from tests.distributed import run_on_ranks
from tests.parity.tiny_run import LEARNING_RATE, Curve, TinyRun, take_steps

pytestmark = pytest.mark.slow

TABLES = ("embed_tokens", "lm_head")
ADAPTATION = Adaptation(rows_to_save=TABLES, trained_rows=TABLES)
BASE_TOKENS = 400
LEVELS = (0, 1, 2, 3)
# As in the other parity tests.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Found:
    curve: Curve
    rest: Curve
    """The same steps from the second on, by an engine of the next ZeRO level that took over the state after the first."""
    state_bytes: int


def engine_of(run: TinyRun) -> Engine:
    model = load_model(run.base, run.precision)
    attach(model, ADAPTATION, 1, BASE_TOKENS)
    accumulation = run.global_batch_size // (run.micro_batch_size * dist.get_world_size())
    return Engine(SummedLoss(model), EngineSettings(run.zero, run.precision, run.micro_batch_size, accumulation, 0.1, 0.7))


def train(runs: list[TinyRun]) -> list[Found]:
    found = []
    for run, other in zip(runs, [*runs[1:], runs[0]], strict=True):
        engine, rank = engine_of(run), dist.get_rank()
        frozen = engine.frozen_checksums()
        batches = run.batches(rank, dist.get_world_size())
        first = engine.step(batches.of_step(0), LEARNING_RATE, 0, inspect=True)
        state = engine.state(rank == 0).whole()
        curve = [(first.loss, first.gradient_norm), *take_steps(engine, run, 1, 4)]
        assert engine.frozen_checksums() == frozen
        heir = engine_of(other)
        heir.load_state(state if rank == 0 else None)
        size = sum(tensor.nbytes for tensor in state.tensors.values())
        found.append(Found(curve, take_steps(heir, other, 1, 4), size))
    return found


@pytest.fixture(scope="module")
def found(base: Path, text_rows: Path) -> dict[int, Found]:
    runs = [TinyRun(base, text_rows, "fp32", zero=zero) for zero in LEVELS]
    return dict(zip(LEVELS, run_on_ranks(train, 2, runs), strict=True))


@pytest.mark.parametrize("zero", LEVELS)
def test_every_level_learns_the_same(found: dict[int, Found], zero: int) -> None:
    losses, norms = zip(*found[zero].curve, strict=True)
    expected_losses, expected_norms = zip(*found[0].curve, strict=True)
    assert losses == pytest.approx(expected_losses, abs=TOLERANCE)
    assert norms == pytest.approx(expected_norms, rel=TOLERANCE)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("zero", LEVELS)
def test_another_level_goes_on_from_its_state(found: dict[int, Found], zero: int) -> None:
    losses, _ = zip(*found[zero].rest, strict=True)
    assert losses == pytest.approx([loss for loss, _ in found[zero].curve[1:]], abs=TOLERANCE)


def test_the_state_is_of_the_new_rows_alone(found: dict[int, Found]) -> None:
    values = len(TABLES) * (512 - BASE_TOKENS) * 64
    assert {each.state_bytes for each in found.values()} == {3 * 4 * values}
