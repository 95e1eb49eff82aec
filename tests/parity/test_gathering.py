"""The training state is the same however little of it travels at once."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from orchestrator.engine import optimizer_state
from tests.distributed import run_on_ranks
from tests.parity.tiny_run import LEARNING_RATE, TinyRun, tiny_engine

pytestmark = pytest.mark.slow

LEVELS = (0, 1, 2, 3)


def gathered(runs: list[TinyRun]) -> list[tuple[int, bool]]:
    """Of each run the number of tensors, and whether they are the same to the bit in one piece and in many."""
    found = []
    for run in runs:
        engine = tiny_engine(run)
        engine.step(run.batches(dist.get_rank(), dist.get_world_size()).of_step(0), LEARNING_RATE, 0)
        keep = dist.get_rank() == 0
        states = []
        # Shorter than most tensors, and no divisor of their lengths.
        for at_once in (1 << 30, 997):
            optimizer_state._AT_ONCE = at_once
            states.append(engine.state(keep).whole().tensors)
        whole, pieces = states
        same = whole.keys() == pieces.keys() and all(torch.equal(whole[key], pieces[key]) for key in whole)
        found.append((len(whole), same and all(tensor.any() for key, tensor in whole.items() if "master" in key)))
    return found


def test_many_pieces_make_the_same_state(base: Path, text_rows: Path) -> None:
    found = run_on_ranks(gathered, 2, [TinyRun(base, text_rows, "bf16", zero=zero) for zero in LEVELS])
    (count,) = {count for count, _ in found}
    assert count == 30
    assert [same for _, same in found] == [True] * len(LEVELS)
