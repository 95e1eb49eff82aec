"""Walks the plan: for each stage that is not done, prepares its data, runs its body on the cluster, commits the artifact."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import assign
from orchestrator.cluster.sizing import WorkerShape, check_divisible, check_precision, workers_for
from orchestrator.contents import DataFile
from orchestrator.data.documents import check_documents
from orchestrator.data.instructions import check_instructions
from orchestrator.environment import versions
from orchestrator.errors import DataError, RecipeError
from orchestrator.plan.inputs import Inputs, find_inputs
from orchestrator.plan.plan import Plan, PlannedStage, make_plan
from orchestrator.plan.record import Record, commit, read_record
from orchestrator.report.console import Console
from orchestrator.schema import ExportStage, Recipe, TrainStage, VocabularyStage
from orchestrator.stages import bodies
from orchestrator.stages.assignment import HeldOut, results_file
from orchestrator.store import read_json
from orchestrator.tracking import read_metrics


@dataclass(frozen=True)
class Run:
    """One command: what is wanted, from what, and where it goes."""

    recipe: Recipe
    inputs: Inputs
    run_root: Path
    console: Console


def run_pipeline(recipe: Recipe, console: Console) -> Plan:
    """Runs what the selected stages still need, and gives the plan with all of it done."""
    run_root = Path(recipe.run_root).expanduser().resolve()
    run = Run(recipe, find_inputs(recipe), run_root, console)
    plan = make_plan(recipe, run.inputs.contents, run_root)
    console.show_plan(recipe, plan)
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
        check_divisible(run.recipe.workers, trained)
    run.console.say("starting Ray")
    with connected(run.recipe.cluster) as capacity:
        shape = workers_for(run.recipe.workers, capacity, run.recipe.cluster, trained)
        check_precision(run.recipe.precision, shape)
        for planned in plan.to_run:
            plan = plan.with_record(planned.name, _run_stage(run, plan, planned, shape))
    return plan


def _run_stage(run: Run, plan: Plan, planned: PlannedStage, shape: WorkerShape) -> Record:
    """Runs one stage and commits it; until then its folder counts for nothing."""
    started = time.monotonic()
    _clear(planned.folder)
    run.console.stage_begins(planned)
    match planned.stage:
        case VocabularyStage():
            results = _run_vocabulary(run, planned)
        case TrainStage():
            results = _run_train(run, plan, planned, shape)
        case ExportStage():
            results = _run_export(run, plan, planned)
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
            results={**results, "seconds": time.monotonic() - started},
            environment=versions(),
        ),
    )
    run.console.stage_ends(planned, record)
    return record


def _run_vocabulary(run: Run, planned: PlannedStage) -> dict[str, Any]:
    from orchestrator.cluster.session import run_task  # noqa: PLC0415

    inputs = run.inputs
    text = inputs.data.get(planned.name, ())
    base_text = inputs.base_text or inputs.held_out.get("retention", ())
    return run_task(bodies.vocabulary_body, planned.stage, inputs.base, text, base_text, planned.folder, run.recipe.seed)


def _run_train(run: Run, plan: Plan, planned: PlannedStage, shape: WorkerShape) -> dict[str, Any]:
    from orchestrator.cluster.session import run_task  # noqa: PLC0415
    from orchestrator.cluster.workers import run_workers  # noqa: PLC0415

    sources = assign.sources_of(run.inputs, plan, planned)
    rows = run_task(bodies.prepare_body, assign.preparation(run.inputs, planned, sources.tokenizer), run.run_root)
    held_out = tuple(
        HeldOut(name, run_task(bodies.prepare_body, preparation, run.run_root)[0])
        for name, preparation in assign.held_out_preparations(run.recipe, run.inputs, sources.tokenizer).items()
    )
    assignment = assign.training(run.recipe, planned, sources, rows, held_out, shape.cpus)
    metrics = planned.folder / "metrics.jsonl"
    with run.console.progress(assignment.num_steps, lambda: read_metrics(metrics)):
        run_workers(bodies.train_body, assignment, shape, planned.folder)
    results = read_json(results_file(planned.folder))
    complete = {**results, "reference": assign.reference(plan, planned, results, held_out)}
    _warn_if_forgotten(run, planned, complete)
    return complete


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
    """Removes what an unfinished attempt left; a finished stage is never run again."""
    assert read_record(folder) is None, f"{folder} is finished"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "work").mkdir(parents=True)


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
