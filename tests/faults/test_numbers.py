"""Numbers that go wrong while a stage trains: the training ends, says where to look, and keeps what is good."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.checkpoint.generations import newest_good
from orchestrator.checkpoint.writer import CheckpointWriter
from orchestrator.contents import find_data
from orchestrator.data.documents import read_documents
from orchestrator.data.part import Preparation
from orchestrator.data.prepare import prepare
from orchestrator.engine import Engine, EngineSettings, StepResult, Wishes
from orchestrator.errors import TrainingError
from orchestrator.model.loss import SummedLoss
from orchestrator.plan.checkpoints import checkpoint_steps
from orchestrator.stages.random_base import write_random_base
from orchestrator.train.bad_steps import BadStepCheck
from orchestrator.train.checkpoint_hook import CheckpointHook
from orchestrator.train.loop import Progress, train
from orchestrator.train.schedule import Schedule
from orchestrator.vocabulary.training import train_base_model
from tests.distributed import run_on_ranks
from tests.parity.conftest import TINY
from tests.parity.tiny_run import TinyRun, tiny_model

pytestmark = pytest.mark.slow

FINGERPRINT = "f" * 64
FROZEN = "model.model.layers.1.mlp.gate_proj.weight"
POISONED_AFTER, MOST, NUM_STEPS = 4, 3, 20


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Of a LLaMA of two layers, on text in rows of 64 tokens."""
    folder = tmp_path_factory.mktemp("numbers")
    files = find_data("text", TINY.text)
    documents: Iterator[str] = read_documents("text", files)
    (folder / "tokenizer.model").write_bytes(train_base_model(documents, pieces=TINY.pieces).SerializeToString())
    base = folder / "base"
    base.mkdir()
    write_random_base(TINY, folder / "tokenizer.model", base, seed=1)
    rows = prepare(Preparation("next_token", base, "text", files, block_length=64), folder / "runs")
    return TinyRun(base, rows, "bf16", zero=2)


class Poison:
    """A hook: makes one frozen weight infinite after a step, as a broken memory chip might."""

    def __init__(self, model: nn.Module) -> None:
        self._weight = dict(model.named_parameters())[FROZEN]

    @torch.no_grad()
    def after_step(self, progress: Progress, result: StepResult) -> None:
        if progress.step == POISONED_AFTER:
            self._weight[0, 0] = torch.inf


class Alone:
    """A pulse that nobody hears."""

    def beat(self, step: int, phase: str) -> None: ...

    def wishes(self) -> Wishes:
        return Wishes()


def train_until_it_breaks(run: TinyRun, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """The error's message, and what the writer reported."""
    model = SummedLoss(tiny_model(run.base, run.precision))
    settings = EngineSettings(run.zero, run.precision, run.micro_batch_size, 4, weight_decay=0.0, max_gradient_norm=1.0)
    engine, batches, events = Engine(model, settings), run.batches(rank=0, num_workers=1), []

    def describe(progress: Progress, numbers: Mapping[str, int | float]) -> dict[str, Any]:
        return {"step": progress.step}

    schedule = Schedule("constant", 1e-3, NUM_STEPS, 0.0)
    with CheckpointWriter(folder, FINGERPRINT, 2, 1, events.append) as writer:
        hooks = [
            BadStepCheck(MOST, lambda step: f"rows {batches.order.rows_of_step(step).tolist()}"),
            CheckpointHook(engine.state, writer, describe, every_steps=1, num_steps=NUM_STEPS),
            Poison(model),
        ]
        with pytest.raises(TrainingError) as raised:
            train(engine, batches, schedule, hooks, Progress(), Alone())
    return str(raised.value), [dict(event) for event in events]


def test_a_loss_that_becomes_nan_ends_the_training_and_no_checkpoint_of_it_is_kept(run: TinyRun, tmp_path: Path) -> None:
    message, events = run_on_ranks(train_until_it_breaks, 1, run, tmp_path)
    rows = run.batches(rank=0, num_workers=1).order.rows_of_step(POISONED_AFTER).tolist()
    assert message.startswith(f"step {POISONED_AFTER + 1}: loss nan, ")
    assert f"and {MOST - 1} more after it no better. It learned rows {rows}. Look at these" in message
    assert max(event["step"] for event in events) == POISONED_AFTER
    checkpoint, damages = newest_good(tmp_path, FINGERPRINT)
    assert checkpoint is not None
    assert damages == []
    assert checkpoint.step == checkpoint_steps(tmp_path)[-1] <= POISONED_AFTER
    assert all(tensor.isfinite().all() for tensor in checkpoint.tensors.values())
