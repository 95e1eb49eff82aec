"""How each kind of stage is run: what it is made from, and its body on the cluster."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import assign
from orchestrator.cluster.overseer import Overseer
from orchestrator.cluster.sizing import Size
from orchestrator.contents import stated_license
from orchestrator.data.part import Preparation
from orchestrator.data.prepare import IDLE_CPUS, find_prepared, preparation_progress, prepared_key
from orchestrator.data.summary import read_summary
from orchestrator.evaluation import evaluating
from orchestrator.plan.inputs import Inputs
from orchestrator.plan.plan import Plan, PlannedStage
from orchestrator.publishing import Numbers
from orchestrator.report.console import Console
from orchestrator.report.live import Seen, Watched
from orchestrator.report.model_card import Given, model_card
from orchestrator.run_root import RunRoot
from orchestrator.schema import EvaluationStage, ExportStage, LocalCluster, Recipe, TrainStage, VocabularyStage
from orchestrator.stages import bodies
from orchestrator.stages.assignment import HeldOut, results_file
from orchestrator.stages.exchange import DATA_NAME, Exchange
from orchestrator.store import read_json
from orchestrator.tracking.evaluations import EVALUATIONS_NAME, read_evaluations
from orchestrator.tracking.ledger import LEDGER_NAME, read_ledger
from orchestrator.tracking.metrics import METRICS_NAME

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


def run_vocabulary(run: Run, planned: PlannedStage, exchange: Exchange) -> dict[str, Any]:
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


def run_train(run: Run, plan: Plan, planned: PlannedStage, devices: Devices, overseer: Overseer) -> dict[str, Any]:
    from orchestrator.cluster.recovery import train_with_recovery  # noqa: PLC0415

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
    with run.console.training(_watched(run, plan, planned, assignment.num_steps)):
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


def _watched(run: Run, plan: Plan, planned: PlannedStage, num_steps: int) -> Watched:
    """How far the stage is, as its files say it at the time."""
    numbers, folder = Numbers(run.root, planned.folder), planned.folder

    def look() -> Seen:
        return Seen(numbers.rows(), read_ledger(folder / LEDGER_NAME), read_evaluations(folder / EVALUATIONS_NAME))

    return Watched(run.recipe.name, [(each.name, each.state) for each in plan.stages], planned.name, num_steps, look)


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


def run_export(run: Run, plan: Plan, planned: PlannedStage, body: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    sources = assign.sources_of(run.root, run.inputs, plan, planned)
    assignment = assign.exporting(run.recipe, sources, planned, _cards(run, plan, planned))
    return _run_body(sources.exchange, body, planned.stage, assignment)


def _cards(run: Run, plan: Plan, planned: PlannedStage) -> dict[str, str]:
    if not isinstance(planned.stage, ExportStage):
        return {}
    base = run.inputs.base
    stated = run.recipe.license or (stated_license(base) if isinstance(base, Path) else None)
    files = {name: [file.name for file in data] for name, data in run.inputs.data.items()}
    given = Given(stated, files, run.command)
    return {kind: model_card(run.recipe, plan, planned, given, kind) for kind in ("adapter", "merged")}


def run_evaluation(run: Run, plan: Plan, planned: PlannedStage, size: Size) -> dict[str, Any]:
    stage = planned.stage
    assert isinstance(stage, EvaluationStage)
    exchange = assign.exchange_of(run.root, plan, planned)
    exchange.bring()

    def prepare(preparation: Preparation) -> Path:
        return _prepared(run, exchange, preparation)[0]

    if isinstance(run.recipe.cluster, LocalCluster):
        # Nobody else is at work on this machine.
        size = replace(size, cpus=size.cpus * max(size.allowed))
    assignment = evaluating(run.recipe, run.inputs, run.root, plan, planned, prepare, size.cpus)
    if stage.task_folder:
        # The process that reads it need not begin where this one did.
        stage = stage.model_copy(update={"task_folder": str(Path(stage.task_folder).expanduser().absolute())})
    data = {text.rows for model in assignment.models for text in model.held_out}
    results = _run_body(exchange.with_data(sorted(data)), bodies.evaluation_body, stage, assignment, size=size)
    run.console.show_evaluation(results["models"])
    return results


def _run_body(
    exchange: Exchange, body: Callable[..., dict[str, Any]], *arguments: Any, size: Size | None = None
) -> dict[str, Any]:
    """A body that is one process, on whichever machine of the cluster has room; with what a worker gets if that is said."""
    from orchestrator.cluster.session import run_task  # noqa: PLC0415

    cpus, gpus = (size.cpus, size.gpus) if size else (1, 0)
    if exchange.root.url is None:
        return run_task(body, *arguments, cpus=cpus, gpus=gpus)
    results = run_task(bodies.exchanging_body, exchange, body, *arguments, cpus=cpus, gpus=gpus)
    exchange.collect()
    return results
