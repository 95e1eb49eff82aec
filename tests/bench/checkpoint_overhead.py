"""What checkpoints cost: training with one every ten steps against training with none, in turns, in one run.

    python -m tests.bench.checkpoint_overhead

Prints one JSON object. Two ranks, ZeRO-2, bf16, the stage that trains most (LoRA on attention, embedding and head) at the
size of the demonstration. Whether a pair's first or second half saves alternates, so that a drift of the machine cancels.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist

from orchestrator.checkpoint.writer import CheckpointWriter
from orchestrator.contents import find_data
from orchestrator.data.batches import StepBatches
from orchestrator.data.documents import read_documents
from orchestrator.data.order import SampleOrder
from orchestrator.data.part import Preparation
from orchestrator.data.prepare import prepare
from orchestrator.data.rows import PreparedRows
from orchestrator.engine import Engine, EngineSettings, Wishes
from orchestrator.model.adapters import attach
from orchestrator.model.loading import load_model
from orchestrator.model.loss import SummedLoss
from orchestrator.plan.adaptation import Adaptation
from orchestrator.plan.targets import LoraShape
from orchestrator.schema.recipe import RandomBase
from orchestrator.stages.random_base import write_random_base
from orchestrator.train.checkpoint_hook import CheckpointHook
from orchestrator.train.link import Phase
from orchestrator.train.loop import Progress, train
from orchestrator.train.schedule import Schedule
from orchestrator.vocabulary.training import train_base_model
from tests.distributed import run_on_ranks

EVERY_STEPS = 10
PAIRS = 12
STEPS = 20
"""Of each half of a pair."""
BASE = RandomBase(
    kind="random",
    text=("sample:text_english.jsonl",),
    pieces=1000,
    hidden_size=128,
    intermediate_size=344,
    num_layers=4,
    num_heads=8,
    num_key_value_heads=4,
    max_positions=512,
)
ROWS = 4672
"""Of embedding and head, as the demonstration's vocabulary stage leaves them."""
ADAPTATION = Adaptation(
    lora={name: LoraShape(8, 32) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    modules_to_save=("embed_tokens", "lm_head"),
    trained_lora=("q_proj", "k_proj", "v_proj", "o_proj"),
    trained_modules=("embed_tokens", "lm_head"),
)


class _Quiet:
    """A pulse that nobody feels."""

    def beat(self, step: int, phase: Phase) -> None:
        pass

    def wishes(self) -> Wishes:
        return Wishes()


def measure(base: Path, rows: Path, folder: Path) -> dict[str, list[float]]:
    """Seconds of each half, by whether it saved; all ranks call it."""
    model = load_model(base, "bf16")
    model.resize_token_embeddings(ROWS)
    attach(model, ADAPTATION, seed=1)
    engine = Engine(SummedLoss(model), EngineSettings(2, "bf16", 4, 2, 0.01, 1.0))
    prepared = PreparedRows.open(rows)
    batches = StepBatches(prepared, SampleOrder(len(prepared), 16, 1), 4, dist.get_rank(), dist.get_world_size())
    progress = _run(engine, batches, Progress(), None)
    seconds: dict[str, list[float]] = {"saving": [], "plain": []}
    for pair in range(PAIRS):
        for saves in (True, False) if pair % 2 else (False, True):
            dist.barrier()
            started = time.perf_counter()
            progress = _run(engine, batches, progress, folder if saves else None)
            dist.barrier()
            seconds["saving" if saves else "plain"].append(time.perf_counter() - started)
    return seconds


def _run(engine: Engine, batches: StepBatches, progress: Progress, folder: Path | None) -> Progress:
    """So many steps more; the writing of the last checkpoint is waited for, and so is counted whole."""
    end = progress.step + STEPS
    schedule = Schedule("constant", 1e-4, end, 0.0)
    with ExitStack() as stack:
        hooks = []
        if folder:
            writer = None
            if dist.get_rank() == 0:
                writer = stack.enter_context(CheckpointWriter(folder, "0" * 64, 2, 1, lambda _: None))
            hooks = [CheckpointHook(engine.state, writer, _describe, EVERY_STEPS, end)]
        return train(engine, batches, schedule, hooks, progress, _Quiet())


def _describe(progress: Progress, numbers: Mapping[str, int | float]) -> dict[str, object]:
    return {"step": progress.step, "numbers": numbers}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = find_data("text", ["sample:text_english.jsonl"])
        pieces = folder / "tokenizer.model"
        pieces.write_bytes(train_base_model(read_documents("text", files), pieces=BASE.pieces).SerializeToString())
        write_random_base(BASE, pieces, folder / "base", seed=1)
        rows = prepare(Preparation("next_token", folder / "base", "text", files, block_length=128), folder)
        seconds = run_on_ranks(measure, 2, folder / "base", rows, folder / "stage", timeout_seconds=1200)
    ratios = [saving / plain for saving, plain in zip(seconds["saving"], seconds["plain"], strict=True)]
    print(
        json.dumps(
            {
                "steps_per_half": STEPS,
                "pairs": PAIRS,
                "every_steps": EVERY_STEPS,
                "plain_seconds_per_step": statistics.median(seconds["plain"]) / STEPS,
                "saving_seconds_per_step": statistics.median(seconds["saving"]) / STEPS,
                "overhead_median_of_pairs": statistics.median(ratios) - 1,
                "overhead_of_totals": sum(seconds["saving"]) / sum(seconds["plain"]) - 1,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
