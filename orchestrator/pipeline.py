"""Walks the plan: for each stage that is not done, prepares its data, runs its body on the cluster, commits the artifact."""

from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path

from orchestrator.cluster.forkserver_client import PRELOADED, shared_forkserver
from orchestrator.cluster.sizing import allowed_numbers, check_precision, workers_for
from orchestrator.errors import ClusterError, RecipeError
from orchestrator.lease import InFolder, InStore, Place, held
from orchestrator.plan.inputs import find_inputs
from orchestrator.plan.plan import Plan, PlannedStage, make_plan
from orchestrator.preflight import Preflight, look_at_root, look_here, look_there, nodes_here, rehearse
from orchestrator.report.console import Console
from orchestrator.run_root import RunRoot, run_root
from orchestrator.schema import EvaluationStage, LocalCluster, Recipe, TrainStage, VocabularyStage
from orchestrator.stage_kinds import Devices, Run, prepare_all
from orchestrator.stage_run import remove_loose_ends, run_stage

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
    planned = _plans(recipes, root, console, command)
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
    console.say("reading the data")
    found = look_here(planned)
    if recipes[0].preflight == "first":
        _tell(found, console)
        found.raise_problems()
    return _run_on_cluster(planned, found)


def _plans(recipes: Sequence[Recipe], root: RunRoot, console: Console, command: str) -> Planned:
    try:
        runs = [Run(recipe, find_inputs(recipe), root, console, command) for recipe in recipes]
    except RecipeError as error:
        # What is wrong besides is said at once.
        besides = look_at_root(root).problems if root.local.exists() else []
        raise RecipeError([*error.problems, *besides]) from error
    root.fetch_records()
    return [(run, make_plan(run.recipe, run.inputs.contents, root.local)) for run in runs]


def _tell(found: Preflight, console: Console) -> None:
    for warning in dict.fromkeys(found.warnings):
        console.warn(warning)


def _run_on_cluster(planned: Planned, here: Preflight) -> list[Plan]:
    run, trained = planned[0][0], _trained(planned)
    if run.recipe.workers:
        allowed_numbers(run.recipe.workers, trained)
    run.console.say("starting Ray")
    # On one machine what training imports is imported beside Ray's start.
    is_shared = bool(trained) and isinstance(run.recipe.cluster, LocalCluster)
    with shared_forkserver(PRELOADED) if is_shared else nullcontext("") as shared:
        return _run_beside(planned, trained, shared, here)


def _run_beside(planned: Planned, trained: dict[str, TrainStage], shared: str, here: Preflight) -> list[Plan]:
    # Ray takes seconds to import; a pipeline that is done does not wait for it.
    from orchestrator.cluster.node_check import check_nodes  # noqa: PLC0415
    from orchestrator.cluster.recovery import worker_group  # noqa: PLC0415
    from orchestrator.cluster.session import connected  # noqa: PLC0415

    run = planned[0][0]
    with connected(run.recipe.cluster) as capacity:
        size = workers_for(run.recipe.workers, capacity, run.recipe.cluster, trained)
        check_precision(run.recipe.precision, size)
        problems: list[str] = []
        if isinstance(run.recipe.cluster, LocalCluster):
            nodes = nodes_here(run)
        else:
            run.console.say("asking every node")
            files = sorted({file for each, plan in planned for file in _files_read(each, plan)})
            nodes, problems = check_nodes(run.root, files)
        there = look_there(planned, size, nodes)
        with closing(worker_group(size, run.recipe.recovery, run.console.warn, shared)) as group:
            devices = Devices(size, group)
            if run.recipe.preflight == "only":
                _preflight_alone(planned, here.joined(there, problems), devices)
                return [plan for _, plan in planned]
            _tell(there, run.console)
            if problems:
                raise ClusterError("\n".join(problems))
            there.raise_problems()
            return [_run_stages(each, plan, devices) for each, plan in planned]


def _preflight_alone(planned: Planned, found: Preflight, devices: Devices) -> None:
    """All of it, with a dry step; RecipeError lists what would end the run."""
    run = planned[0][0]
    if not found.problems:
        run.console.say("taking a dry step of each stage")
        for each, plan in planned:
            rehearse(each, plan, devices, found)
    run.console.show_table(("checked", "found"), found.checked)
    _tell(found, run.console)
    found.raise_problems()
    run.console.say("nothing stands in the way; the same without preflight=only runs it")


def _trained(planned: Planned) -> dict[str, TrainStage]:
    """The stages that workers train, by name, and of several recipes by theirs."""
    found: dict[str, TrainStage] = {}
    for number, (run, plan) in enumerate(planned, start=1):
        # A sweep's recipes have one name.
        prefix = f"{run.recipe.name} {number} " if len(planned) > 1 else ""
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
        if isinstance(planned.stage, TrainStage | EvaluationStage):
            data += [file for files in inputs.held_out.values() for file in files]
        found |= {Path(file.url) for file in data if file.url.startswith("/")}
        if isinstance(planned.stage, VocabularyStage) and planned.stage.sentencepiece_model:
            found.add(Path(planned.stage.sentencepiece_model).expanduser().absolute())
    return sorted(found)


def _leases(run: Run, planned: PlannedStage) -> Place:
    """Where all machines see them that may run the stage."""
    return InStore(run.root, planned.folder.name) if run.root.url else InFolder(planned.folder)
