"""What looks ahead or back while a stage trains leaves no trace: a rehearsal, a sample, the return to an earlier state."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from orchestrator.data.batches import largest_micro_batch
from orchestrator.data.rows import PreparedRows
from orchestrator.model.writing import go_on
from tests.distributed import run_on_ranks
from tests.parity.tiny_run import STEPS, Curve, TinyRun, take_steps, tiny_engine, tiny_model

pytestmark = pytest.mark.slow

MIDDLE = 3
PROMPT = [1, 7, 12, 40]
LEVELS: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)


@dataclass(frozen=True)
class Looked:
    """A run that looked around, and one that did not."""

    plain: Curve
    looking: Curve
    weights_then: dict[str, bytes]
    """Of what learns, in the middle."""
    weights_returned: dict[str, bytes]
    """After all steps and the return."""
    weights_at_the_end: dict[str, bytes]


def looked_around(run: TinyRun) -> Looked:
    plain = take_steps(tiny_engine(run), run, 0, STEPS)
    engine = tiny_engine(run)
    names = [name for name, parameter in engine._parameters.items() if parameter.requires_grad]

    def weights() -> dict[str, bytes]:
        return {name: tensor.float().numpy().tobytes() for name, tensor in engine.parameters(names)}

    engine.rehearse(largest_micro_batch(PreparedRows.open(run.rows), run.micro_batch_size))
    curve = take_steps(engine, run, 0, MIDDLE)
    go_on(engine.next_logits, PROMPT, 3, end_id=-1)
    state, then = engine.state(dist.get_rank() == 0).whole(), weights()
    engine.rehearse(largest_micro_batch(PreparedRows.open(run.rows), run.micro_batch_size))
    curve += take_steps(engine, run, MIDDLE, STEPS)
    end = weights()
    engine.load_state(state if dist.get_rank() == 0 else None)
    return Looked(plain, curve, then, weights(), end)


def all_levels(run: TinyRun) -> dict[int, Looked]:
    return {zero: looked_around(replace(run, zero=zero)) for zero in LEVELS}


@pytest.fixture(scope="module")
def looked(base: Path, text_rows: Path) -> dict[int, Looked]:
    return run_on_ranks(all_levels, 2, TinyRun(base, text_rows, "bf16", dropout=0.2))


@pytest.mark.parametrize("zero", LEVELS)
def test_looking_around_changes_no_step(looked: dict[int, Looked], zero: int) -> None:
    assert looked[zero].looking == looked[zero].plain


@pytest.mark.parametrize("zero", LEVELS)
def test_the_return_to_an_earlier_state_is_exact(looked: dict[int, Looked], zero: int) -> None:
    found = looked[zero]
    assert found.weights_then
    assert found.weights_returned == found.weights_then
    assert all(found.weights_at_the_end[name] != weight for name, weight in found.weights_then.items())


def written(run: TinyRun) -> dict[int, list[int]]:
    return {zero: go_on(tiny_engine(replace(run, zero=zero)).next_logits, PROMPT, 8, end_id=-1) for zero in LEVELS}


def test_what_it_writes_is_what_stock_generation_writes(base: Path, text_rows: Path) -> None:
    found = run_on_ranks(written, 2, TinyRun(base, text_rows, "fp32"))
    model: Any = tiny_model(base, "fp32").eval()
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        given = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
        )
    assert found == dict.fromkeys(LEVELS, given[0, len(PROMPT) :].tolist())
