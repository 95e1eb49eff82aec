"""Runs one stage of the plan under its lease: what it is made from, its body on the cluster, its record."""

import os
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import assign
from orchestrator.cluster.overseer import Overseer
from orchestrator.cluster.sizing import Size, check_compiler
from orchestrator.data.part import Preparation
from orchestrator.data.prepare import IDLE_CPUS, find_prepared, preparation_progress, prepared_key
from orchestrator.data.summary import read_summary
from orchestrator.environment import versions
from orchestrator.errors import LeaseError, OrchestratorError
from orchestrator.lease import Lease
from orchestrator.plan.checkpoints import CHECKPOINTS_NAME
from orchestrator.plan.inputs import Inputs
from orchestrator.plan.plan import Plan, PlannedStage
from orchestrator.plan.record import Record, commit, read_record
from orchestrator.publishing import Numbers, open_ledger
from orchestrator.report.console import Console
from orchestrator.run_root import RunRoot
from orchestrator.schema import ExportStage, MergeStage, Recipe, TrainStage, VocabularyStage
from orchestrator.stages import bodies
from orchestrator.stages.assignment import HeldOut, results_file
from orchestrator.stages.exchange import DATA_NAME, Exchange
from orchestrator.store import read_json
from orchestrator.tracking.ledger import LEDGER_NAME, Ledger, read_ledger, summarize
from orchestrator.tracking.metrics import METRICS_NAME, read_metrics

if TYPE_CHECKING:
    from orchestrator.cluster.group import WorkerGroup


@dataclass(frozen=True)
class Run:
    """One command: what is wanted, from what, and where it goes."""

    recipe: Recipe
    inputs: Inputs
    root: RunRoot
    console: Console
    command: str
    """As a person would type it; other runs of the same stage are told."""


@dataclass(frozen=True)
class Devices:
    """What training stages run on."""

    size: Size
    group: "WorkerGroup"


def run_stage(run: Run, plan: Plan, planned: PlannedStage, devices: Devices, lease: Lease) -> Record:
    """Runs one stage and commits it; until then its folder counts for nothing."""
    stage = planned.folder.name
    run.root.fetch_records(stage)
    if record := read_record(planned.folder):
        # Another run finished it while this one waited for the stages before.
        return record
    started = time.monotonic()
    for name in (LEDGER_NAME, METRICS_NAME):
        run.root.fetch_file(f"{stage}/{name}")
    exchange = assign.exchange_of(run.root, plan, planned)
    exchange.clear()
    run.console.stage_begins(planned)
    with open_ledger(run.root, planned.folder, lease, run.console.warn) as ledger, _ending_noted(planned.folder, ledger):
        rows = read_metrics(planned.folder / METRICS_NAME)
        step = rows[-1]["step"] if rows else 0
        ledger.write(
            "begin",
            pid=os.getpid(),
            host=socket.gethostname(),
            command=run.command,
            pipeline=run.recipe.name,
            step=step,
        )
        match planned.stage:
            case VocabularyStage():
                results = _run_vocabulary(run, planned, exchange)
            case TrainStage():
                results = _run_train(
                    run, plan, planned, devices, Overseer(ledger, run.console.warn, run.console.show_learning, lease.check)
                )
            case ExportStage():
                results = _run_export(run, plan, planned, bodies.export_body)
            case MergeStage():
                results = _run_export(run, plan, planned, bodies.merge_body) | assign.passed_on(plan, planned)
        ledger.write("finish", step=results.get("steps", 0))
    lease.check()
    results = {**results, **_history(planned), "seconds": time.monotonic() - started}
    with run.root.committing(stage):
        record = _commit(run, planned, results)
        exchange.publish_record()
    remove_loose_ends(run.root, planned)
    run.console.stage_ends(planned, record)
    return record


def remove_loose_ends(root: RunRoot, planned: PlannedStage) -> None:
    """Once a stage is done, nothing goes on from its checkpoints, and what it made has a record."""
    root.remove_inside(planned.folder.name, (CHECKPOINTS_NAME, "work"))
    shutil.rmtree(planned.folder / CHECKPOINTS_NAME, ignore_errors=True)


def _commit(run: Run, planned: PlannedStage, results: dict[str, Any]) -> Record:
    shutil.rmtree(planned.folder / "work", ignore_errors=True)
    return commit(
        planned.folder,
        Record(
            stage=planned.name,
            kind=planned.stage.kind,
            fingerprint=planned.fingerprint,
            identity=planned.identity,
            parents=planned.parents,
            recipe=run.recipe.model_dump(mode="json"),
            results=results,
            environment=versions(),
        ),
    )


@contextmanager
def _ending_noted(stage_folder: Path, ledger: Ledger) -> Iterator[None]:
    """So that the next command does not take this one for killed."""
    try:
        yield
    except LeaseError:
        # The stage is somebody else's now, and its ledger, too.
        raise
    except KeyboardInterrupt:
        ledger.write("stop", reason="SIGINT", step=0)
        raise
    except OrchestratorError as error:
        if read_ledger(stage_folder / LEDGER_NAME)[-1]["event"] not in ("failure", "stop"):
            ledger.write("failure", cause="error", step=0, message=str(error))
        raise


def _history(planned: PlannedStage) -> dict[str, Any]:
    """How a stage came to its end, over all attempts."""
    events, rows = read_ledger(planned.folder / LEDGER_NAME), read_metrics(planned.folder / METRICS_NAME)
    summary = summarize(events, rows)
    found: dict[str, Any] = {"history": summary.as_dict()}
    if rows:
        found["tokens_per_second"] = rows[-1]["tokens"] / summary.useful_seconds
        found["step"] = _typical_step(rows)
        found["checkpoint_bytes"] = max((event["bytes"] for event in events if event["event"] == "checkpoint"), default=0)
    return found


def _typical_step(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over the steps; of checkpoints, which most steps have none of, the share of each."""
    names = {name for row in rows for name in row if name.endswith("seconds") or name == "flops_utilisation"}
    typical = {name: statistics.median(row.get(name, 0.0) for row in rows) for name in sorted(names)}
    return typical | {"checkpoint_seconds": sum(row.get("checkpoint_seconds", 0.0) for row in rows) / len(rows)}


def _run_vocabulary(run: Run, planned: PlannedStage, exchange: Exchange) -> dict[str, Any]:
    inputs, stage = run.inputs, planned.stage
    assert isinstance(stage, VocabularyStage)
    if stage.sentencepiece_model:
        # The process that reads it need not begin where this one did.
        absolute = str(Path(stage.sentencepiece_model).expanduser().absolute())
        stage = stage.model_copy(update={"sentencepiece_model": absolute})
    text = inputs.data.get(planned.name, ())
    base_text = inputs.base_text or inputs.held_out.get("retention", ())
    arguments = (stage, inputs.base, text, base_text, planned.folder, run.recipe.seed)
    return _run_body(exchange, bodies.vocabulary_body, *arguments)


def prepare_all(run: Run, plan: Plan) -> None:
    """The data of every training stage to run, once its tokenizer is there: what is wrong with it is found before anything
    is learned, and the workers need not make room for that between two stages."""
    trained = [planned for planned in plan.to_run if isinstance(planned.stage, TrainStage)]
    said: set[str] = set()
    for planned in trained:
        sources = assign.data_sources_of(run.root, run.inputs, plan, planned)
        sources.exchange.bring()
        for preparation in assign.all_preparations(run.recipe, run.inputs, planned, sources.tokenizer):
            if (key := prepared_key(preparation)) not in said and not find_prepared(preparation, run.root.local):
                run.console.say(f"preparing {preparation.field}")
                _prepared(run, sources.exchange, preparation)
            said.add(key)


def _run_train(run: Run, plan: Plan, planned: PlannedStage, devices: Devices, overseer: Overseer) -> dict[str, Any]:
    from orchestrator.cluster.recovery import train_with_recovery  # noqa: PLC0415

    check_compiler(devices.size)
    sources = assign.sources_of(run.root, run.inputs, plan, planned)
    # What the workers are told depends on it, so it is needed on this machine, too.
    sources.exchange.bring()
    rows = _prepared(run, sources.exchange, assign.preparation(run.recipe, run.inputs, planned, sources.tokenizer))
    if summary := read_summary(rows[0]):
        run.console.say(f"  {summary}")
        for complaint in summary.complaints:
            run.console.warn(f"  skipped: {complaint}")
    held_out = tuple(
        HeldOut(name, _prepared(run, sources.exchange, preparation)[0])
        for name, preparation in assign.held_out_preparations(run.recipe, run.inputs, sources.tokenizer).items()
    )
    assignment = assign.training(run.recipe, planned, sources, rows, held_out, devices.size.cpus)
    with run.console.progress(assignment.num_steps, Numbers(run.root, planned.folder).rows):
        train_with_recovery(assignment, devices.group, run.recipe.recovery, overseer)
        # Rank 0 may have been on another machine.
        sources.exchange.collect()
        run.root.fetch_file(f"{planned.folder.name}/{METRICS_NAME}")
    results = read_json(results_file(planned.folder))
    complete = {
        **assign.passed_on(plan, planned),
        **results,
        "reference": assign.reference(plan, planned, results, held_out),
    }
    _warn_if_forgotten(run, planned, complete)
    return complete


def _prepared(run: Run, exchange: Exchange, preparation: Preparation) -> tuple[Path, int]:
    """The folder of prepared data and how many rows it has; what is there already costs no process."""
    from orchestrator.cluster.session import run_task  # noqa: PLC0415

    name = f"data-{prepared_key(preparation)}"
    if found := find_prepared(preparation, run.root.local):
        # The command that prepared it may have been killed before it was published.
        run.root.publish(name, DATA_NAME)
        return found
    if run.root.url and run.root.is_committed(name, DATA_NAME):
        run.root.fetch(name, DATA_NAME)
        if found := find_prepared(preparation, run.root.local):
            return found
    with run.console.preparing(lambda: preparation_progress(preparation, run.root.local)):
        # What waits takes next to nothing, and leaves the cores to those that do the work.
        answer = run_task(bodies.prepare_body, exchange, preparation, cpus=IDLE_CPUS)
    run.root.fetch(name, DATA_NAME)
    return answer


def _warn_if_forgotten(run: Run, planned: PlannedStage, results: dict[str, Any]) -> None:
    """The stage is kept: what was learned may be worth what was forgotten, and only the user can say."""
    if run.recipe.retention is None:
        return
    before, after = results["reference"]["retention"], results["held_out"]["retention"]["after"]
    rise = after["bits_per_character"] - before["bits_per_character"]
    if rise > run.recipe.retention.max_rise:
        run.console.warn(
            f"  {planned.name}: the retention text costs {rise:.3f} bits per character more than under the base model, "
            f"and retention.max_rise is {run.recipe.retention.max_rise:g}; mix such text into the data, or train less"
        )


def _run_export(run: Run, plan: Plan, planned: PlannedStage, body: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    sources = assign.sources_of(run.root, run.inputs, plan, planned)
    assignment = assign.exporting(run.recipe, sources, planned)
    return _run_body(sources.exchange, body, planned.stage, assignment)


def _run_body(exchange: Exchange, body: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """A body that is one process, on whichever machine of the cluster has room."""
    from orchestrator.cluster.session import run_task  # noqa: PLC0415

    if exchange.root.url is None:
        return run_task(body, *arguments)
    results = run_task(bodies.exchanging_body, exchange, body, *arguments)
    exchange.collect()
    return results
