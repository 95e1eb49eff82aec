"""A training stage, as each of its workers runs it: base and earlier adapter in, a verified adapter out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.checkpoint.adapter import read_adapter
from orchestrator.checkpoint.writer import CheckpointWriter
from orchestrator.data.batches import StepBatches, evaluation_batches, largest_micro_batch
from orchestrator.data.order import SampleOrder
from orchestrator.data.rows import PreparedRows
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.engine import Engine, EngineSettings, StepResult, peak_flops
from orchestrator.model.adapters import (
    attach,
    count_by_kind,
    count_parameters,
    load_tensors,
    second_factors,
)
from orchestrator.model.attention import use_cpu_attention
from orchestrator.model.flops import step_flops
from orchestrator.model.loading import leave_file, load_model
from orchestrator.model.loss import SummedLoss
from orchestrator.schema import Lora
from orchestrator.stages.assignment import Results, TrainAssignment, TrainEnding, results_file
from orchestrator.stages.measuring import HeldOutNumbers, Measuring
from orchestrator.stages.resume import Resumed, resume, return_to_best
from orchestrator.stages.resume import describe as describe_checkpoint
from orchestrator.stages.saving import save_learned
from orchestrator.stages.transfer import bring_to_each_node, hand_over, transferring
from orchestrator.store import write_json
from orchestrator.tracking import MetricsFile, start_mirror
from orchestrator.tracking.evaluations import EVALUATIONS_NAME, write_evaluations
from orchestrator.tracking.ledger import LEDGER_NAME, read_ledger, summarize
from orchestrator.tracking.metrics import METRICS_NAME, read_metrics
from orchestrator.train.bad_steps import BadStepCheck
from orchestrator.train.checkpoint_hook import CheckpointHook
from orchestrator.train.checks import LearningCheck, check_end_is_learned, preflight
from orchestrator.train.evaluations import Evaluations, Row
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
    engine = make_engine(assignment, model, run.num_workers)
    if resumed:
        engine.load_state(resumed.state)
    elif torch.cuda.is_available():
        # Where memory is a hard limit, and the pass takes a moment.
        engine.rehearse(largest_micro_batch(run.batches.rows, assignment.micro_batch_size))
    progress = resumed.progress if resumed else Progress()
    measuring = Measuring(assignment, link, engine, run.rank, run.num_workers)
    with model.base_alone():
        # Before they learned anything virtual tokens are noise, and no part of the base.
        before = resumed.held_out if resumed else measuring.held_out(progress)
    check = LearningCheck(engine.master_checksums, engine.frozen_checksums, resumed.learning if resumed else None)
    with _recorded(run, progress, _utilisation(run, engine)) as record:
        evaluations = _evaluations(assignment, measuring, record, resumed)
        schedule = _schedule(assignment, evaluations)
        with _saved(run, engine, check, before, evaluations) as saving:
            hooks = [*record.hooks, check, BadStepCheck(assignment.bad_steps, run.describe_batch), evaluations, saving]
            progress = train(engine, run.batches, schedule, hooks, progress, run.pulse())
        if not schedule.is_spent(progress.step):
            return TrainEnding(progress.step, completed=False)
        check.check_frozen()
        kept = progress.step
        if best := evaluations.best_first():
            link.beat(progress.step, "evaluating")
            kept = return_to_best(assignment, link, engine, best, kept)
        after = evaluations.held_out_of(kept) or measuring.held_out(progress)
        record.summary.update(held_out=after, trainable=trainable)
    link.beat(progress.step, "saving")
    save_learned(assignment, replace(assignment.origin, step=kept), engine, model, run.rank)
    results: Results = {
        "steps": progress.step,
        "kept_step": kept,
        "trainable": trainable,
        "parameters": total,
        "tokens": progress.tokens,
        "held_out": {name: {"before": before[name], "after": after[name]} for name in after},
        "evaluations": evaluations.rows,
    }
    _leave(run, progress, results)
    return TrainEnding(progress.step, completed=True)


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

    def describe_batch(self, step: int) -> str:
        """The samples of a step, with the beginning of the first ones."""
        batches, tokenizer = self.batches, load_tokenizer(self.assignment.tokenizer)
        rows = batches.order.rows_of_step(step)
        begins = [tokenizer.decode(batches.rows.row(index).tokens[:16].tolist()) for index in rows[:4]]
        quoted = "; ".join(f"row {index} {text!r}" for index, text in zip(rows, begins, strict=False))
        return f"rows {', '.join(map(str, rows))} of {self.assignment.rows} ({quoted}{'; …' if len(rows) > 4 else ''})"


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


def make_engine(assignment: TrainAssignment, model: SummedLoss, num_workers: int) -> Engine:
    """DeepSpeed around the model; all ranks must call."""
    stage = assignment.stage
    ratio = stage.method.learning_rate_ratio if isinstance(stage.method, Lora) else 1.0
    settings = EngineSettings(
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
    return Engine(model, settings)


def _evaluations(
    assignment: TrainAssignment, measuring: Measuring, record: "_Record", resumed: Resumed | None
) -> Evaluations:
    every_steps, keep_best = assignment.evaluation.every_steps, assignment.stage.keep_best
    earlier = resumed.evaluations if resumed else ()
    record.tell(earlier)
    return Evaluations(measuring.row, record.tell, every_steps, keep_best, assignment.num_steps, earlier)


def _schedule(assignment: TrainAssignment, evaluations: Evaluations) -> Schedule:
    stage = assignment.stage
    return Schedule(stage.schedule, stage.learning_rate, assignment.num_steps, stage.warmup_fraction, evaluations.is_over)


def _utilisation(run: _Run, engine: Engine) -> Utilisation:
    """All ranks call it together, so that each finds what its device does while the others work."""
    assignment = run.assignment
    dist.barrier()
    peak = torch.tensor(peak_flops(assignment.precision), dtype=torch.float64, device=engine.device)
    dist.all_reduce(peak)
    flops = step_flops(run.model, assignment.stage.resources.gradient_checkpointing)
    return Utilisation(flops, run.batches.rows.seen, peak.item())


def _leave(run: _Run, progress: Progress, results: Results) -> None:
    """Results for the driver, and what the store is to have; all ranks call it."""
    assignment = run.assignment
    with transferring(assignment, run.link, progress.step, "saving"):
        if run.rank == 0:
            own = {"peak_memory_bytes": peak_memory_bytes(), "workers": run.num_workers, "zero": assignment.zero}
            write_json(results_file(assignment.folder), results | own)
            hand_over(assignment)
        dist.barrier()


@dataclass(frozen=True)
class _Record:
    """Where the numbers of a run are written down; rank 0 does, since all ranks have the same."""

    hooks: list[Hook]
    tell: Callable[[Sequence[Row]], None]
    """All evaluations so far."""
    summary: dict[str, Any]
    """To be filled; it is the end of the mirror."""


@contextmanager
def _recorded(run: _Run, progress: Progress, utilisation: Utilisation) -> Iterator[_Record]:
    if run.rank > 0:
        yield _Record([], lambda rows: None, {})
        return
    assignment = run.assignment
    metrics, ledger = assignment.folder / METRICS_NAME, assignment.folder / LEDGER_NAME
    mirror = start_mirror(assignment.tracking, assignment.run)
    summary: dict[str, Any] = {}
    exit_code = 1

    def tell(rows: Sequence[Row]) -> None:
        path = assignment.folder / EVALUATIONS_NAME
        # Also of none, where a run that was killed had measured what is measured again.
        if rows or path.exists():
            write_evaluations(path, rows)
        # Those of an earlier attempt are there already.
        if rows and rows[-1]["step"] > progress.step:
            named = {f"{text}/{name}": value for text, each in rows[-1]["held_out"].items() for name, value in each.items()}
            mirror.log(rows[-1]["step"], named)

    try:
        with MetricsFile(metrics, keep_through_step=progress.step) as file:
            recorder = MetricsHook(file, mirror, assignment.stage.log_every_steps, assignment.num_steps, utilisation)
            yield _Record([recorder, _FirstStep(run.link)], tell, summary)
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
def _saved(
    run: _Run, engine: Engine, check: LearningCheck, before: HeldOutNumbers, evaluations: Evaluations
) -> Iterator[CheckpointHook]:
    """The hook that saves; what is on its way to the disk is there when the `with` ends."""
    assignment, policy = run.assignment, run.assignment.checkpoint

    def describe(progress: Progress, numbers: Mapping[str, int | float]) -> Mapping[str, Any]:
        return describe_checkpoint(progress, numbers, before, check.state(), evaluations.rows)

    with ExitStack() as stack:
        writer = None
        if run.rank == 0:
            fingerprint, root = assignment.origin.fingerprint, assignment.exchange.root
            writer = CheckpointWriter(assignment.folder, fingerprint, policy.keep, policy.max_failures, run.link.note, root)
            stack.enter_context(writer)
        yield CheckpointHook(engine.state, writer, describe, policy.every_steps, assignment.num_steps, evaluations.best)
