"""Walks the plan: for each stage that is not done, prepares its data, runs its body on the cluster, commits the artifact."""

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path

from orchestrator.cluster.forkserver_client import PRELOADED, shared_forkserver
from orchestrator.cluster.sizing import allowed_numbers, check_precision, workers_for
from orchestrator.contents import DataFile
from orchestrator.data.documents import check_documents
from orchestrator.data.instructions import check_instructions
from orchestrator.data.records import pass_by, stop
from orchestrator.errors import DataError, RecipeError
from orchestrator.lease import InFolder, InStore, Place, held
from orchestrator.plan.inputs import find_inputs
from orchestrator.plan.plan import Plan, PlannedStage, make_plan
from orchestrator.report.console import Console
from orchestrator.run_root import RunRoot, run_root
from orchestrator.schema import LocalCluster, Recipe, TrainStage, VocabularyStage
from orchestrator.stage_run import Devices, Run, prepare_all, remove_loose_ends, run_stage

Planned = list[tuple[Run, Plan]]
"""Pipelines with what is left of them to run."""


def run_pipeline(recipe: Recipe, console: Console, command: str) -> Plan:
    """Runs what the selected stages still need, and gives the plan with all of it done."""
    (plan,) = run_pipelines([recipe], console, command, lambda plans: console.show_plan(recipe, plans[0]))
    console.show_results(plan)
    return plan


def run_pipelines(
    recipes: Sequence[Recipe], console: Console, command: str, show: Callable[[Sequence[Plan]], None]
) -> list[Plan]:
    """The same for several recipes that differ in stages and seeds alone, one after the other on the same workers.

    `show` tells a person what is planned. A stage that several of them have runs once.
    """
    root = run_root(recipes[0].run_root)
    runs = [Run(recipe, find_inputs(recipe), root, console, command) for recipe in recipes]
    root.fetch_records()
    planned = [(run, make_plan(run.recipe, run.inputs.contents, root.local)) for run in runs]
    show([plan for _, plan in planned])
    if root.url:
        console.say(f"results are kept at {root.url}; {root.local} is this machine's copy of what it needs")
    for entry in (entry for _, plan in planned for entry in plan.stages):
        # A run that was killed at the very end had no time for this.
        if entry.record:
            remove_loose_ends(root, entry)
    if not any(plan.to_run for _, plan in planned):
        console.say("nothing to run: every stage that was asked for is done")
        return [plan for _, plan in planned]
    _check_writable(root)
    for number, (run, plan) in enumerate(planned):
        if number == 0 or run.inputs.data != planned[0][0].inputs.data:
            _check_data(run, plan)
    return _run_on_cluster(planned)


def _run_on_cluster(planned: Planned) -> list[Plan]:
    run, trained = planned[0][0], _trained(planned)
    if run.recipe.workers:
        allowed_numbers(run.recipe.workers, trained)
    run.console.say("starting Ray")
    # On one machine what training imports is imported beside Ray's start.
    is_shared = bool(trained) and isinstance(run.recipe.cluster, LocalCluster)
    with shared_forkserver(PRELOADED) if is_shared else nullcontext("") as shared:
        return _run_beside(planned, trained, shared)


def _run_beside(planned: Planned, trained: dict[str, TrainStage], shared: str) -> list[Plan]:
    # Ray takes seconds to import; a pipeline that is done does not wait for it.
    from orchestrator.cluster.node_check import check_nodes  # noqa: PLC0415
    from orchestrator.cluster.recovery import worker_group  # noqa: PLC0415
    from orchestrator.cluster.session import connected  # noqa: PLC0415

    run = planned[0][0]
    with connected(run.recipe.cluster) as capacity:
        size = workers_for(run.recipe.workers, capacity, run.recipe.cluster, trained)
        check_precision(run.recipe.precision, size)
        if not isinstance(run.recipe.cluster, LocalCluster):
            run.console.say("asking every node")
            check_nodes(run.root, sorted({file for each, plan in planned for file in _files_read(each, plan)}))
        with closing(worker_group(size, run.recipe.recovery, run.console.warn, shared)) as group:
            return [_run_stages(each, plan, Devices(size, group)) for each, plan in planned]


def _trained(planned: Planned) -> dict[str, TrainStage]:
    """The stages that workers train, by name, and of several recipes by theirs."""
    found = {}
    for run, plan in planned:
        prefix = f"{run.recipe.name} " if len(planned) > 1 else ""
        found |= {f"{prefix}{each.name}": each.stage for each in plan.to_run if isinstance(each.stage, TrainStage)}
    return found


def _run_stages(run: Run, plan: Plan, devices: Devices) -> Plan:
    is_prepared = False
    for planned in plan.to_run:
        is_training = isinstance(planned.stage, TrainStage)
        if not is_training:
            # It needs their place.
            devices.group.close()
        with held(_leases(run, planned), run.command, run.console.warn) as lease:
            if is_training and not is_prepared:
                prepare_all(run, plan)
                is_prepared = True
            plan = plan.with_record(planned.name, run_stage(run, plan, planned, devices, lease))
    return plan


def _files_read(run: Run, plan: Plan) -> list[Path]:
    """Files of this machine that the stages to run read where they lie, on whichever node that is."""
    inputs, found = run.inputs, set()
    if isinstance(inputs.base, Path):
        found.add(inputs.base / "config.json")
    for planned in plan.to_run:
        data = [*inputs.data.get(planned.name, ())]
        if isinstance(planned.stage, TrainStage):
            data += [file for files in inputs.held_out.values() for file in files]
        found |= {Path(file.url) for file in data if file.url.startswith("/")}
        if isinstance(planned.stage, VocabularyStage) and planned.stage.sentencepiece_model:
            found.add(Path(planned.stage.sentencepiece_model).expanduser().absolute())
    return sorted(found)


def _leases(run: Run, planned: PlannedStage) -> Place:
    """Where all machines see them that may run the stage."""
    return InStore(run.root, planned.folder.name) if run.root.url else InFolder(planned.folder)


def _check_writable(root: RunRoot) -> None:
    name = f".probe-{socket.gethostname()}-{os.getpid()}"
    try:
        root.local.mkdir(parents=True, exist_ok=True)
        probe = root.local / name
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RecipeError(f"run_root: {root.local} cannot be written to: {error.strerror}") from error
    root.write(name, b"")
    root.delete(name)


def _check_data(run: Run, plan: Plan) -> None:
    """Reads all data that the stages to run will learn from: a bad line is found now, not when its stage begins."""
    run.console.say("reading the data")
    problems = []
    seen: set[tuple] = set()
    checks: list[tuple[Callable[..., object], str, tuple[DataFile, ...]]]
    checks = [
        (check_instructions, "validation_instructions", files) if name == "instructions" else (check_documents, name, files)
        for name, files in run.inputs.held_out.items()
    ]
    for planned in plan.to_run:
        if files := run.inputs.data.get(planned.name):
            answers = isinstance(planned.stage, TrainStage) and planned.stage.objective == "answers"
            checks.append((check_instructions if answers else check_documents, f"stages.{planned.name}", files))
    # Those that are skipped are counted when the data is prepared.
    complain = stop if run.recipe.reading.bad_records == "stop" else pass_by
    for check, field, files in checks:
        if (check, files) in seen:
            continue
        seen.add((check, files))
        try:
            check(field, files, complain)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
