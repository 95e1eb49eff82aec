"""Walks the plan: for each stage that is not done, prepares its data, runs its body on the cluster, commits the artifact."""

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import assign
from orchestrator.cluster.overseer import Overseer
from orchestrator.cluster.sizing import Size, allowed_numbers, check_compiler, check_precision, workers_for
from orchestrator.contents import DataFile
from orchestrator.data.documents import check_documents
from orchestrator.data.instructions import check_instructions
from orchestrator.data.prepare import Preparation, find_prepared
from orchestrator.environment import versions
from orchestrator.errors import DataError, LeaseError, OrchestratorError, RecipeError
from orchestrator.lease import Lease, held
from orchestrator.plan.checkpoints import CHECKPOINTS_NAME
from orchestrator.plan.inputs import Inputs, find_inputs
from orchestrator.plan.plan import Plan, PlannedStage, make_plan
from orchestrator.plan.record import WORK_NAMES, Record, commit, read_record
from orchestrator.report.console import Console
from orchestrator.schema import ExportStage, Recipe, TrainStage, VocabularyStage
from orchestrator.stages import bodies
from orchestrator.stages.assignment import HeldOut, results_file
from orchestrator.store import read_json
from orchestrator.tracking.ledger import LEDGER_NAME, Ledger, read_ledger, summarize
from orchestrator.tracking.metrics import METRICS_NAME, read_metrics


@dataclass(frozen=True)
class Run:
    """One command: what is wanted, from what, and where it goes."""

    recipe: Recipe
    inputs: Inputs
    run_root: Path
    console: Console
    command: str
    """As a person would type it; other runs of the same stage are told."""


def run_pipeline(recipe: Recipe, console: Console, command: str) -> Plan:
    """Runs what the selected stages still need, and gives the plan with all of it done."""
    run_root = Path(recipe.run_root).expanduser().resolve()
    run = Run(recipe, find_inputs(recipe), run_root, console, command)
    plan = make_plan(recipe, run.inputs.contents, run_root)
    console.show_plan(recipe, plan)
    for planned in plan.stages:
        # A run that was killed at the very end had no time for this.
        if planned.record:
            _remove_checkpoints(planned)
    if plan.to_run:
        _check_writable(run_root)
        _check_data(run, plan)
        plan = _run_on_cluster(run, plan)
    else:
        console.say("nothing to run: every stage that was asked for is done")
    console.show_results(plan)
    return plan


def _run_on_cluster(run: Run, plan: Plan) -> Plan:
    # Ray takes seconds to import; a pipeline that is done does not wait for it.
    from orchestrator.cluster.session import connected  # noqa: PLC0415

    trained = {planned.name: planned.stage for planned in plan.to_run if isinstance(planned.stage, TrainStage)}
    if run.recipe.workers:
        allowed_numbers(run.recipe.workers, trained)
    run.console.say("starting Ray")
    with connected(run.recipe.cluster) as capacity:
        size = workers_for(run.recipe.workers, capacity, run.recipe.cluster, trained)
        check_precision(run.recipe.precision, size)
        for planned in plan.to_run:
            with held(planned.folder, run.command, run.console.warn) as lease:
                plan = plan.with_record(planned.name, _run_stage(run, plan, planned, size, lease))
    return plan


def _run_stage(run: Run, plan: Plan, planned: PlannedStage, size: Size, lease: Lease) -> Record:
    """Runs one stage and commits it; until then its folder counts for nothing."""
    if record := read_record(planned.folder):
        # Another run finished it while this one waited for the stages before.
        return record
    started = time.monotonic()
    _clear(planned.folder)
    run.console.stage_begins(planned)
    ledger_file = planned.folder / LEDGER_NAME
    with Ledger(ledger_file) as ledger, _ending_noted(ledger_file, ledger):
        rows = read_metrics(planned.folder / METRICS_NAME)
        step = rows[-1]["step"] if rows else 0
        ledger.write("begin", pid=os.getpid(), host=socket.gethostname(), command=run.command, step=step)
        match planned.stage:
            case VocabularyStage():
                results = _run_vocabulary(run, planned)
            case TrainStage():
                results = _run_train(run, plan, planned, size, Overseer(ledger, run.console.warn, lease.check))
            case ExportStage():
                results = _run_export(run, plan, planned)
        ledger.write("finish", step=results.get("steps", 0))
    lease.check()
    shutil.rmtree(planned.folder / "work", ignore_errors=True)
    record = commit(
        planned.folder,
        Record(
            stage=planned.name,
            kind=planned.stage.kind,
            fingerprint=planned.fingerprint,
            identity=planned.identity,
            parents=planned.parents,
            recipe=run.recipe.model_dump(mode="json"),
            results={**results, **_history(planned), "seconds": time.monotonic() - started},
            environment=versions(),
        ),
    )
    _remove_checkpoints(planned)
    run.console.stage_ends(planned, record)
    return record


@contextmanager
def _ending_noted(file: Path, ledger: Ledger) -> Iterator[None]:
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
        if read_ledger(file)[-1]["event"] not in ("failure", "stop"):
            ledger.write("failure", cause="error", step=0, message=str(error))
        raise


def _history(planned: PlannedStage) -> dict[str, Any]:
    """How a stage came to its end, over all attempts."""
    events, rows = read_ledger(planned.folder / LEDGER_NAME), read_metrics(planned.folder / METRICS_NAME)
    summary = summarize(events, rows)
    found: dict[str, Any] = {"history": summary.as_dict()}
    if rows:
        found["tokens_per_second"] = rows[-1]["tokens"] / summary.useful_seconds
        found["checkpoint_bytes"] = max((event["bytes"] for event in events if event["event"] == "checkpoint"), default=0)
    return found


def _run_vocabulary(run: Run, planned: PlannedStage) -> dict[str, Any]:
    from orchestrator.cluster.session import run_task  # noqa: PLC0415

    inputs = run.inputs
    text = inputs.data.get(planned.name, ())
    base_text = inputs.base_text or inputs.held_out.get("retention", ())
    return run_task(bodies.vocabulary_body, planned.stage, inputs.base, text, base_text, planned.folder, run.recipe.seed)


def _run_train(run: Run, plan: Plan, planned: PlannedStage, size: Size, overseer: Overseer) -> dict[str, Any]:
    from orchestrator.cluster.recovery import train_with_recovery  # noqa: PLC0415

    check_compiler(size)
    sources = assign.sources_of(run.inputs, plan, planned)
    rows = _prepared(run, assign.preparation(run.inputs, planned, sources.tokenizer))
    held_out = tuple(
        HeldOut(name, _prepared(run, preparation)[0])
        for name, preparation in assign.held_out_preparations(run.recipe, run.inputs, sources.tokenizer).items()
    )
    assignment = assign.training(run.recipe, planned, sources, rows, held_out, size.cpus)
    metrics = planned.folder / METRICS_NAME
    with run.console.progress(assignment.num_steps, lambda: read_metrics(metrics)):
        train_with_recovery(assignment, size, run.recipe.recovery, overseer)
    results = read_json(results_file(planned.folder))
    complete = {**results, "reference": assign.reference(plan, planned, results, held_out)}
    _warn_if_forgotten(run, planned, complete)
    return complete


def _prepared(run: Run, preparation: Preparation) -> tuple[Path, int]:
    """The folder of prepared data and how many rows it has; what is there already costs no process."""
    from orchestrator.cluster.session import run_task  # noqa: PLC0415

    return find_prepared(preparation, run.run_root) or run_task(bodies.prepare_body, preparation, run.run_root)


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


def _run_export(run: Run, plan: Plan, planned: PlannedStage) -> dict[str, Any]:
    from orchestrator.cluster.session import run_task  # noqa: PLC0415

    return run_task(bodies.export_body, planned.stage, assign.exporting(run.recipe, run.inputs, plan, planned))


def _clear(folder: Path) -> None:
    """Removes what an unfinished attempt left of its artifact; its checkpoints, numbers and history stay."""
    for path in folder.iterdir():
        if path.name == "work" or (path.name not in WORK_NAMES and path.is_dir()):
            shutil.rmtree(path)
        elif path.name not in WORK_NAMES and not path.name.startswith("."):
            path.unlink()
    (folder / "work").mkdir()


def _remove_checkpoints(planned: PlannedStage) -> None:
    """Once a stage is done, nothing goes on from them."""
    shutil.rmtree(planned.folder / CHECKPOINTS_NAME, ignore_errors=True)


def _check_writable(run_root: Path) -> None:
    try:
        run_root.mkdir(parents=True, exist_ok=True)
        probe = run_root / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RecipeError(f"run_root: {run_root} cannot be written to: {error.strerror}") from error


def _check_data(run: Run, plan: Plan) -> None:
    """Reads all data that the stages to run will learn from: a bad line is found now, not when its stage begins."""
    run.console.say("reading the data")
    problems = []
    seen: set[tuple] = set()
    checks: list[tuple[Callable[..., object], str, tuple[DataFile, ...]]]
    checks = [(check_documents, name, files) for name, files in run.inputs.held_out.items()]
    for planned in plan.to_run:
        if files := run.inputs.data.get(planned.name):
            answers = isinstance(planned.stage, TrainStage) and planned.stage.objective == "answers"
            checks.append((check_instructions if answers else check_documents, f"stages.{planned.name}", files))
    for check, field, files in checks:
        if (check, files) in seen:
            continue
        seen.add((check, files))
        try:
            check(field, files)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
