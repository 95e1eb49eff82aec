"""What the workers send is what the formulas say: bytes counted in a real run on two ranks, by ZeRO level."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
import torch.distributed as dist

from orchestrator.plan.traffic import Sizes, Traffic, step_traffic
from tests.distributed import run_on_ranks
from tests.parity.tiny_run import LEARNING_RATE, TinyRun, tiny_engine

pytestmark = pytest.mark.slow

COUNTED = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
OTHERS = ("all_gather", "reduce_scatter", "reduce", "broadcast", "all_to_all_single", "gather", "scatter", "send", "isend")
AGREEMENT_BYTES = 32
"""Loss, wishes, gradient norm and overflow of a step, together; numbers, not tensors."""
Zero = Literal[0, 1, 2, 3]
RUNS: list[tuple[Zero, int]] = [(zero, accumulation) for zero in get_args(Zero) for accumulation in (1, 2)]


def counted_runs(base: Path, rows: Path) -> list[tuple[dict[str, int], Sizes]]:
    # Once for the process, whose end undoes it: DeepSpeed takes some of these functions when it starts, and keeps them.
    found: Counter[str] = Counter()
    for name in (*COUNTED, *OTHERS):
        setattr(dist, name, counting(name, getattr(dist, name), found))
    return [counted(TinyRun(base, rows, "bf16", micro_batch_size=4 // number, zero=zero), found) for zero, number in RUNS]


def counting(name: str, original: Callable[..., Any], found: Counter[str]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        tensors = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
        # What is gathered is the output, what is scattered the input: the larger of the two.
        found[name] += max(tensor.numel() * tensor.element_size() for tensor in tensors) if tensors else 1
        return original(*arguments, **named)

    return call


def counted(run: TinyRun, found: Counter[str]) -> tuple[dict[str, int], Sizes]:
    """The bytes of each kind of call in the third step, when DeepSpeed has seen enough of them, and the model's sizes."""
    engine = tiny_engine(run)
    batches = run.batches(dist.get_rank(), dist.get_world_size())
    for step in range(3):
        found.clear()
        engine.step(batches.of_step(step), LEARNING_RATE, step)
    sizes = {name: getattr(tensor, "ds_numel", tensor.numel()) for name, tensor in engine._parameters.items()}
    return dict(found), Sizes(sum(sizes[name] for name in engine._trainable), sum(sizes.values()))


@pytest.fixture(scope="module")
def counts(base: Path, text_rows: Path) -> dict[tuple[int, int], tuple[dict[str, int], Sizes]]:
    return dict(zip(RUNS, run_on_ranks(counted_runs, 2, base, text_rows), strict=True))


@pytest.mark.parametrize(("zero", "accumulation"), RUNS)
def test_the_formulas_are_the_bytes_of_a_real_step(counts, zero: Any, accumulation: int) -> None:
    found, sizes = counts[zero, accumulation]
    assert not found.keys() & set(OTHERS)
    assert sizes.trainable < 0.7 * sizes.total
    expected = step_traffic(zero, sizes, accumulation)
    assert found.get("all_gather_into_tensor", 0) == expected.all_gathered
    assert found.get("reduce_scatter_tensor", 0) == expected.reduce_scattered
    assert 0 < found["all_reduce"] - expected.all_reduced <= AGREEMENT_BYTES


def test_what_a_worker_sends_follows_the_rings() -> None:
    assert Traffic(all_reduced=800).sent(2) == 800
    assert Traffic(all_reduced=800).sent(8) == 1400
    assert Traffic(all_gathered=800, reduce_scattered=800).sent(8) == Traffic(all_reduced=800).sent(8)
    assert Traffic(all_reduced=800).sent(1) == 0


def test_a_model_too_large_to_keep_is_gathered_twice() -> None:
    small, large = Sizes(10, 10**9), Sizes(10, 10**9 + 1)
    assert step_traffic(3, large, 1).all_gathered == 2 * (step_traffic(3, small, 1).all_gathered + 2)
