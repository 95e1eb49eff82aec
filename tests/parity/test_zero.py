"""The engine at every ZeRO level is a plain torch loop: the same losses, the same gradient norms."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from orchestrator.data.batches import StepBatch
from tests.distributed import run_on_ranks
from tests.parity.tiny_run import (
    LEARNING_RATE,
    MAX_GRADIENT_NORM,
    STEPS,
    WEIGHT_DECAY,
    Curve,
    Precision,
    TinyRun,
    engine_curves,
    tiny_model,
)

pytestmark = pytest.mark.slow

# Measured over six steps: losses within 2.7e-4 and norms within 8.5e-4 of themselves in bf16; 7e-7 and 3e-7 in fp32.
LOSS_TOLERANCE = {"bf16": 8e-4, "fp32": 1e-5}
NORM_TOLERANCE = {"bf16": 2.5e-3, "fp32": 1e-5}
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp32")
LEVELS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def two_ranks(base: Path, text_rows: Path) -> dict[tuple[str, int], Curve]:
    """The engine's curves on two ranks, each with two micro-batches, by precision and ZeRO level."""
    runs = [TinyRun(base, text_rows, precision, zero=zero) for precision in PRECISIONS for zero in LEVELS]
    curves = run_on_ranks(engine_curves, 2, runs)
    return {(run.precision, run.zero): curve for run, curve in zip(runs, curves, strict=True)}


@pytest.fixture(scope="module")
def plain(base: Path, text_rows: Path) -> dict[str, Curve]:
    return {precision: plain_curve(TinyRun(base, text_rows, precision, micro_batch_size=8)) for precision in PRECISIONS}


@pytest.mark.parametrize("zero", LEVELS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_engine_is_a_plain_torch_loop(two_ranks, plain, precision, zero):
    losses, norms = zip(*two_ranks[precision, zero], strict=True)
    plain_losses, plain_norms = zip(*plain[precision], strict=True)
    assert losses == pytest.approx(plain_losses, rel=0, abs=LOSS_TOLERANCE[precision])
    assert norms == pytest.approx(plain_norms, rel=NORM_TOLERANCE[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_curve_learns_and_some_steps_are_clipped(plain, precision):
    losses, norms = zip(*plain[precision], strict=True)
    assert losses[-1] < losses[0] - 0.3
    assert min(norms) < MAX_GRADIENT_NORM < max(norms)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_adam_that_counts_a_step_too_many_would_be_seen(base, text_rows, plain, precision):
    late = plain_curve(TinyRun(base, text_rows, precision, micro_batch_size=8), steps_counted_before=1)
    differences = [abs(loss - right) for (loss, _), (right, _) in zip(late[1:], plain[precision][1:], strict=True)]
    assert min(differences) > 10 * LOSS_TOLERANCE[precision]


def plain_curve(run: TinyRun, steps_counted_before: int = 0) -> Curve:
    """The run in one process: weights in the run's precision, fp32 masters, torch's own AdamW and clipping."""
    model = tiny_model(run.base, run.precision).train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masters = [nn.Parameter(weight.detach().float().clone()) for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    _count_steps(optimizer, masters, steps_counted_before)
    batches = run.batches(rank=0, num_workers=1)
    curve = []
    for step in range(STEPS):
        loss = _loss(model, batches.of_step(step))
        loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad, weight.grad = _gradient(weight).float(), None
        norm = nn.utils.clip_grad_norm_(masters, MAX_GRADIENT_NORM)
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)
        curve.append((loss.item(), norm.item()))
    return curve


def _loss(model: nn.Module, batch: StepBatch) -> Tensor:
    (whole,) = batch.micro_batches
    logits = model(input_ids=whole.input_ids).logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), whole.labels[:, 1:].flatten())


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad


def _count_steps(optimizer: torch.optim.Optimizer, masters: list[nn.Parameter], steps: int) -> None:
    """Steps on zero gradients at no learning rate: they move nothing, and Adam counts them."""
    (group,) = optimizer.param_groups
    group["lr"] = 0.0
    for _ in range(steps):
        for master in masters:
            master.grad = torch.zeros_like(master)
        optimizer.step()
    group["lr"] = LEARNING_RATE
