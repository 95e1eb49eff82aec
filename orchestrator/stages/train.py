"""A training stage, as each of its workers runs it: base and earlier adapter in, a verified adapter out."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.checkpoint.adapter import read_adapter, write_adapter
from orchestrator.data.batches import StepBatch, StepBatches, evaluation_batches
from orchestrator.data.order import SampleOrder
from orchestrator.data.rows import PreparedRows
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.engine import Engine, EngineSettings
from orchestrator.model.adapters import adapter_parameters, attach, count_parameters, load_tensors
from orchestrator.model.loading import load_model
from orchestrator.model.loss import SummedLoss, bits_per_character
from orchestrator.stages.assignment import Results, TrainAssignment, results_file
from orchestrator.store import write_json
from orchestrator.tracking import MetricsFile, start_mirror
from orchestrator.train.checks import LearningCheck, check_end_is_learned, preflight
from orchestrator.train.loop import Hook, Progress, train
from orchestrator.train.metrics_hook import MetricsHook, peak_memory_bytes
from orchestrator.train.schedule import Schedule


def run_train(assignment: TrainAssignment) -> None:
    """Trains one stage; every rank calls it, with torch.distributed up. Rank 0 leaves results and adapter."""
    torch.set_num_threads(assignment.threads)
    rank, num_workers = dist.get_rank(), dist.get_world_size()
    model = build_model(assignment)
    batches = _batches(assignment, rank, num_workers)
    _check_before(assignment, model, batches)
    trainable, total = count_parameters(model)
    engine = Engine(model, _engine_settings(assignment, num_workers))
    before = _evaluate(assignment, engine, rank, num_workers)
    check = LearningCheck(engine.master_checksums, engine.frozen_checksums)
    with _recorded(assignment, rank) as (hooks, summary):
        started = time.monotonic()
        progress = _train(assignment, engine, batches, [*hooks, check])
        seconds = time.monotonic() - started
        check.check_frozen()
        after = _evaluate(assignment, engine, rank, num_workers)
        summary |= {"held_out": after, "trainable": trainable}
    _save(assignment, engine, model, rank)
    if rank == 0:
        results: Results = {
            "steps": progress.step,
            "trainable": trainable,
            "parameters": total,
            "tokens": progress.tokens,
            "tokens_per_second": progress.tokens / seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "held_out": {name: {"before": before[name], "after": after[name]} for name in after},
            "workers": num_workers,
            "zero": assignment.zero,
        }
        write_json(results_file(assignment.folder), results)
    dist.barrier()


def build_model(assignment: TrainAssignment) -> SummedLoss:
    """Base, earlier stages' adapter and this stage's new factors, with gradients where the stage trains."""
    model = load_model(assignment.base, assignment.precision)
    attach(model, assignment.adaptation, assignment.seed)
    if assignment.parent_adapter:
        load_tensors(model, read_adapter(assignment.parent_adapter, assignment.base, assignment.tokenizer))
    if assignment.stage.resources.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return SummedLoss(model)


def _batches(assignment: TrainAssignment, rank: int, num_workers: int) -> StepBatches:
    rows = PreparedRows.open(assignment.rows)
    order = SampleOrder(len(rows), assignment.stage.global_batch_size, assignment.seed)
    return StepBatches(rows, order, assignment.stage.resources.micro_batch_size, rank, num_workers)


def _check_before(assignment: TrainAssignment, model: SummedLoss, batches: StepBatches) -> None:
    end_id = load_tokenizer(assignment.tokenizer).eos_token_id
    check_end_is_learned(evaluation_batches(batches.rows, 64, 0, 1), end_id)
    preflight(model, batches.of_step(0).micro_batches[0])


def _engine_settings(assignment: TrainAssignment, num_workers: int) -> EngineSettings:
    stage = assignment.stage
    return EngineSettings(
        zero=assignment.zero,
        precision=assignment.precision,
        micro_batch_size=stage.resources.micro_batch_size,
        accumulation=stage.global_batch_size // (stage.resources.micro_batch_size * num_workers),
        weight_decay=stage.weight_decay,
        max_gradient_norm=stage.max_gradient_norm,
    )


def _train(assignment: TrainAssignment, engine: Engine, batches: StepBatches, hooks: Sequence[Hook]) -> Progress:
    stage = assignment.stage
    schedule = Schedule(stage.schedule, stage.learning_rate, assignment.num_steps, stage.warmup_fraction)
    # Dropout draws from each rank's own generator; two ranks must not drop the same units.
    torch.manual_seed(assignment.seed * 1_000_003 + batches.rank)
    return train(engine, _stream(batches), schedule, hooks, Progress())


@contextmanager
def _recorded(assignment: TrainAssignment, rank: int) -> Iterator[tuple[list[Hook], dict[str, Any]]]:
    """Hooks that write the numbers down, and a summary to fill; rank 0 does, since all ranks have the same numbers."""
    if rank > 0:
        yield [], {}
        return
    mirror = start_mirror(assignment.tracking, assignment.run)
    summary: dict[str, Any] = {}
    exit_code = 1
    try:
        with MetricsFile(assignment.folder / "metrics.jsonl", keep_through_step=0) as file:
            yield [MetricsHook(file, mirror, assignment.stage.log_every_steps, assignment.num_steps)], summary
        exit_code = 0
    finally:
        mirror.finish(summary, exit_code)


def _stream(batches: StepBatches) -> Iterator[StepBatch]:
    step = 0
    while True:
        yield batches.of_step(step)
        step += 1


def _evaluate(assignment: TrainAssignment, engine: Engine, rank: int, num_workers: int) -> dict[str, dict[str, float]]:
    """Loss and bits per character of each held-out text, by name; all ranks must call."""
    found = {}
    for text in assignment.held_out:
        rows = PreparedRows.open(text.rows)
        batches = list(evaluation_batches(rows, assignment.stage.resources.micro_batch_size, rank, num_workers))
        nats = engine.evaluate(batches)
        found[text.name] = {
            "loss": nats / rows.summary.targets,
            "bits_per_character": bits_per_character(nats, rows.characters),
        }
    return found


def _save(assignment: TrainAssignment, engine: Engine, model: SummedLoss, rank: int) -> None:
    """All ranks gather, rank 0 writes."""
    prefix = "model."
    keys = {prefix + name: key for name, key in adapter_parameters(model.model, assignment.adaptation).items()}
    tensors = {keys[name]: tensor for name, tensor in engine.parameters(list(keys)) if rank == 0}
    if rank == 0:
        folder: Path = assignment.folder / "adapter"
        write_adapter(folder, tensors, assignment.adaptation, assignment.origin, assignment.base, assignment.tokenizer)
