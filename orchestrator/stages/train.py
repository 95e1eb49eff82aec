"""A training stage, as each of its workers runs it: base and earlier adapter in, a verified adapter out."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.checkpoint.adapter import read_adapter, write_adapter
from orchestrator.checkpoint.whole_model import write_whole_model
from orchestrator.checkpoint.writer import CheckpointWriter
from orchestrator.data.batches import MicroBatch, StepBatches, evaluation_batches
from orchestrator.data.order import SampleOrder
from orchestrator.data.rows import PreparedRows
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.engine import Engine, EngineSettings, StepResult, peak_flops
from orchestrator.model.adapters import (
    adapter_parameters,
    attach,
    count_by_kind,
    count_parameters,
    load_tensors,
    second_factors,
    written_tensors,
)
from orchestrator.model.attention import use_cpu_attention
from orchestrator.model.flops import step_flops
from orchestrator.model.loading import leave_file, load_model
from orchestrator.model.loss import SummedLoss, bits_per_character
from orchestrator.model.subspace import NAME as SUBSPACE
from orchestrator.model.subspace import SubspaceModule
from orchestrator.schema import Lora
from orchestrator.stages.assignment import Results, TrainAssignment, TrainEnding, results_file
from orchestrator.stages.resume import describe as describe_checkpoint
from orchestrator.stages.resume import resume
from orchestrator.stages.transfer import bring_to_each_node, hand_over, transferring
from orchestrator.store import write_json
from orchestrator.tracking import MetricsFile, start_mirror
from orchestrator.tracking.ledger import LEDGER_NAME, read_ledger, summarize
from orchestrator.tracking.metrics import METRICS_NAME, read_metrics
from orchestrator.train.bad_steps import BadStepCheck
from orchestrator.train.checkpoint_hook import CheckpointHook
from orchestrator.train.checks import LearningCheck, check_end_is_learned, preflight
from orchestrator.train.link import Link
from orchestrator.train.loop import Hook, Progress, train
from orchestrator.train.metrics_hook import MetricsHook, Utilisation, peak_memory_bytes
from orchestrator.train.pulse import LinkedPulse
from orchestrator.train.schedule import Schedule


def run_train(assignment: TrainAssignment, link: Link) -> TrainEnding:
    """Trains one stage from its newest good checkpoint, or from its start; every rank calls it, with torch.distributed up.

    Rank 0 leaves checkpoints, results and adapter. Asked to stop, it saves and returns before the stage is complete.
    """
    torch.set_num_threads(assignment.threads)
    link.beat(0, "loading")
    bring_to_each_node(assignment, link)
    model = build_model(assignment)
    run = _Run(assignment, link, model, dist.get_rank(), dist.get_world_size())
    with transferring(assignment, link, 0, "loading"):
        resumed = resume(assignment, link, run.rank)
    if resumed is None:
        _check_before(assignment, model, run.batches)
    trainable, total = count_parameters(model)
    if run.rank == 0:
        link.note({"event": "learns", "kinds": count_by_kind(model.model)})
    engine = Engine(model, _engine_settings(assignment, model, run.num_workers))
    if resumed:
        engine.load_state(resumed.state)
    progress = resumed.progress if resumed else Progress()
    with model.base_alone():
        # Before they learned anything virtual tokens are noise, and no part of the base.
        before = resumed.held_out if resumed else run.evaluate(engine, progress)
    check = LearningCheck(engine.master_checksums, engine.frozen_checksums, resumed.learning if resumed else None)
    recording = _recorded(run, progress, _utilisation(run, engine))
    with recording as (recorders, summary), _saved(run, engine, check, before) as saving:
        hooks = [*recorders, check, BadStepCheck(assignment.bad_steps, run.describe_batch), saving]
        progress = train(engine, run.batches, _schedule(assignment), hooks, progress, run.pulse())
        if progress.step < assignment.num_steps:
            return TrainEnding(progress.step, completed=False)
        check.check_frozen()
        after = run.evaluate(engine, progress)
        summary |= {"held_out": after, "trainable": trainable}
    link.beat(progress.step, "saving")
    _save(assignment, engine, model, run.rank)
    with transferring(assignment, link, progress.step, "saving"):
        if run.rank == 0:
            results: Results = {
                "steps": progress.step,
                "trainable": trainable,
                "parameters": total,
                "tokens": progress.tokens,
                "peak_memory_bytes": peak_memory_bytes(),
                "held_out": {name: {"before": before[name], "after": after[name]} for name in after},
                "workers": run.num_workers,
                "zero": assignment.zero,
            }
            write_json(results_file(assignment.folder), results)
            hand_over(assignment)
        dist.barrier()
    return TrainEnding(progress.step, completed=True)


HeldOutNumbers = dict[str, dict[str, float]]
"""Loss and bits per character of each held-out text, by its name."""


@dataclass(frozen=True)
class _Run:
    """One rank of the stage."""

    assignment: TrainAssignment
    link: Link
    model: SummedLoss
    rank: int
    num_workers: int

    @property
    def batches(self) -> StepBatches:
        assignment = self.assignment
        rows = PreparedRows.open(assignment.rows)
        order = SampleOrder(len(rows), assignment.stage.global_batch_size, assignment.seed)
        return StepBatches(rows, order, assignment.micro_batch_size, self.rank, self.num_workers)

    def pulse(self) -> LinkedPulse:
        return LinkedPulse(self.link, self.assignment.checkpoint.every_minutes if self.rank == 0 else None)

    def evaluate(self, engine: Engine, progress: Progress) -> HeldOutNumbers:
        """All ranks must call."""
        found = {}
        for text in self.assignment.held_out:
            rows = PreparedRows.open(text.rows)
            batches = evaluation_batches(rows, self.assignment.micro_batch_size, self.rank, self.num_workers)
            nats = engine.evaluate(self._beating(batches, progress))
            found[text.name] = {
                "loss": nats / rows.summary.targets,
                "bits_per_character": bits_per_character(nats, rows.characters),
            }
        return found

    def describe_batch(self, step: int) -> str:
        """The samples of a step, with the beginning of the first ones."""
        batches, tokenizer = self.batches, load_tokenizer(self.assignment.tokenizer)
        rows = batches.order.rows_of_step(step)
        begins = [tokenizer.decode(batches.rows.row(index).tokens[:16].tolist()) for index in rows[:4]]
        quoted = "; ".join(f"row {index} {text!r}" for index, text in zip(rows, begins, strict=False))
        return f"rows {', '.join(map(str, rows))} of {self.assignment.rows} ({quoted}{'; …' if len(rows) > 4 else ''})"

    def _beating(self, batches: Iterable[MicroBatch], progress: Progress) -> Iterator[MicroBatch]:
        for batch in batches:
            self.link.beat(progress.step, "evaluating")
            yield batch


def build_model(assignment: TrainAssignment) -> SummedLoss:
    """Base, earlier stages' adapter and this stage's new factors, with gradients where the stage trains."""
    model = load_model(assignment.base, assignment.precision, assignment.stage.quantization)
    if not torch.cuda.is_available():
        use_cpu_attention(model)
        leave_file(model)
    attach(model, assignment.adaptation, assignment.seed, assignment.base_tokens, assignment.base)
    if assignment.parent_adapter:
        load_tensors(model, read_adapter(assignment.parent_adapter, assignment.base, assignment.tokenizer))
    if assignment.stage.resources.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return SummedLoss(model)


def _check_before(assignment: TrainAssignment, model: SummedLoss, batches: StepBatches) -> None:
    end_id = load_tokenizer(assignment.tokenizer).eos_token_id
    check_end_is_learned(evaluation_batches(batches.rows, 64, 0, 1), end_id)
    preflight(model, batches.of_step(0).micro_batches[0])


def _engine_settings(assignment: TrainAssignment, model: SummedLoss, num_workers: int) -> EngineSettings:
    stage = assignment.stage
    ratio = stage.method.learning_rate_ratio if isinstance(stage.method, Lora) else 1.0
    return EngineSettings(
        zero=assignment.zero,
        precision=assignment.precision,
        micro_batch_size=assignment.micro_batch_size,
        accumulation=stage.global_batch_size // (assignment.micro_batch_size * num_workers),
        weight_decay=stage.weight_decay,
        max_gradient_norm=stage.max_gradient_norm,
        seed=assignment.seed,
        optimizer=stage.optimizer,
        faster={name: ratio for name in second_factors(model) if ratio != 1},
    )


def _schedule(assignment: TrainAssignment) -> Schedule:
    stage = assignment.stage
    return Schedule(stage.schedule, stage.learning_rate, assignment.num_steps, stage.warmup_fraction)


def _utilisation(run: _Run, engine: Engine) -> Utilisation:
    """All ranks call it together, so that each finds what its device does while the others work."""
    assignment = run.assignment
    dist.barrier()
    peak = torch.tensor(peak_flops(assignment.precision), dtype=torch.float64, device=engine.device)
    dist.all_reduce(peak)
    flops = step_flops(run.model, assignment.stage.resources.gradient_checkpointing)
    return Utilisation(flops, run.batches.rows.seen, peak.item())


@contextmanager
def _recorded(run: _Run, progress: Progress, utilisation: Utilisation) -> Iterator[tuple[list[Hook], dict[str, Any]]]:
    """Hooks that write the numbers down, and a summary to fill; rank 0 does, since all ranks have the same numbers."""
    if run.rank > 0:
        yield [], {}
        return
    assignment = run.assignment
    metrics, ledger = assignment.folder / METRICS_NAME, assignment.folder / LEDGER_NAME
    mirror = start_mirror(assignment.tracking, assignment.run)
    summary: dict[str, Any] = {}
    exit_code = 1
    try:
        with MetricsFile(metrics, keep_through_step=progress.step) as file:
            recorder = MetricsHook(file, mirror, assignment.stage.log_every_steps, assignment.num_steps, utilisation)
            yield [recorder, _FirstStep(run.link)], summary
        exit_code = 0
    finally:
        summary["ledger"] = summarize(read_ledger(ledger), read_metrics(metrics)).as_dict()
        mirror.finish(summary, exit_code)


class _FirstStep:
    """A hook: says that training is under way again."""

    def __init__(self, link: Link) -> None:
        self._link: Link | None = link

    def after_step(self, progress: Progress, result: StepResult) -> None:
        if self._link:
            self._link.note({"event": "first_step", "step": progress.step})
        self._link = None


@contextmanager
def _saved(run: _Run, engine: Engine, check: LearningCheck, before: HeldOutNumbers) -> Iterator[CheckpointHook]:
    """The hook that saves; what is on its way to the disk is there when the `with` ends."""
    assignment, policy = run.assignment, run.assignment.checkpoint

    def describe(progress: Progress, numbers: Mapping[str, int | float]) -> Mapping[str, Any]:
        return describe_checkpoint(progress, numbers, before, check.state())

    with ExitStack() as stack:
        writer = None
        if run.rank == 0:
            fingerprint, root = assignment.origin.fingerprint, assignment.exchange.root
            writer = CheckpointWriter(assignment.folder, fingerprint, policy.keep, policy.max_failures, run.link.note, root)
            stack.enter_context(writer)
        yield CheckpointHook(engine.state, writer, describe, policy.every_steps, assignment.num_steps)


def _save(assignment: TrainAssignment, engine: Engine, model: SummedLoss, rank: int) -> None:
    """All ranks gather, rank 0 writes."""
    prefix = "model."
    if assignment.adaptation.full:
        _save_whole(assignment, engine, getattr(model.model, SUBSPACE, None), rank)
        return
    names = [prefix + name for name in adapter_parameters(model.model, assignment.adaptation)]
    parameters = {name.removeprefix(prefix): tensor for name, tensor in engine.parameters(names) if rank == 0}
    if rank == 0:
        tensors = written_tensors(model.model, parameters, assignment.adaptation, assignment.base_tokens)
        folder: Path = assignment.folder / "adapter"
        write_adapter(folder, tensors, assignment.adaptation, assignment.origin, assignment.base, assignment.tokenizer)


def _save_whole(assignment: TrainAssignment, engine: Engine, subspace: SubspaceModule | None, rank: int) -> None:
    """A model is written as it is gathered, a file at a time."""
    prefix = "model."
    layout = {name: shape for name, shape in engine.layout().items() if not name.startswith(f"{prefix}{SUBSPACE}.")}
    coming = ((name.removeprefix(prefix), tensor) for name, tensor in engine.parameters(list(layout)))
    if subspace:
        coming = ((name, tensor.detach()) for name, tensor in subspace.moved(coming))
    if rank > 0:
        # Gathered all the same.
        for _ in coming:
            pass
        return
    named = {name.removeprefix(prefix): tensor for name, tensor in layout.items()}
    beside = (assignment.base, assignment.tokenizer)
    write_whole_model(assignment.folder / "model", named, coming, assignment.origin, beside)
