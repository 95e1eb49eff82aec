"""Before a worker starts: all that can be known to go wrong, at once, each with its remedy."""

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from orchestrator import assign
from orchestrator.cluster.node_facts import Facts, facts_here, free_bytes
from orchestrator.cluster.sizing import Size, check_compiler
from orchestrator.contents import DataFile
from orchestrator.data.documents import check_documents
from orchestrator.data.instructions import check_instructions
from orchestrator.data.records import pass_by, stop
from orchestrator.errors import DataError, OrchestratorError, RecipeError
from orchestrator.plan.forecast import StageForecast, Wanted, stage_forecasts
from orchestrator.plan.plan import Plan, PlannedStage
from orchestrator.plan.shape import shape_of
from orchestrator.report.words import duration, size
from orchestrator.run_root import RunRoot
from orchestrator.schema import ExportStage, LocalCluster, MergeStage, Recipe, TrainStage, VocabularyStage, WandbTracking
from orchestrator.stage_kinds import Devices, Run
from orchestrator.stages.assignment import DryStep, TrainAssignment
from orchestrator.tracking.login import is_logged_in

Planned = Sequence[tuple[Run, Plan]]


@dataclass
class Preflight:
    """What was looked at, and what was found."""

    checked: list[tuple[str, str]] = field(default_factory=list)
    """What is as it should be, and how it is."""
    warnings: list[str] = field(default_factory=list)
    """What a person should know, and may mean."""
    problems: list[str] = field(default_factory=list)
    """What would end the run."""

    def joined(self, other: "Preflight", problems: Sequence[str]) -> "Preflight":
        """Both, and more problems."""
        return Preflight(
            [*self.checked, *other.checked],
            [*self.warnings, *other.warnings],
            [*self.problems, *other.problems, *problems],
        )

    def raise_problems(self) -> None:
        """RecipeError lists all of them."""
        if self.problems:
            raise RecipeError(dict.fromkeys(self.problems))


def look_at_root(root: RunRoot) -> Preflight:
    """Whether the run root can be written to; the one thing that can be asked where nothing can be planned."""
    found = Preflight()
    name = f".probe-{socket.gethostname()}-{os.getpid()}"
    try:
        root.local.mkdir(parents=True, exist_ok=True)
        (root.local / name).touch()
        (root.local / name).unlink()
    except OSError as error:
        found.problems.append(f"run_root: {root.local} cannot be written to: {error.strerror}")
        return found
    try:
        root.write(name, b"")
        root.delete(name)
    except OrchestratorError as error:
        found.problems.append(str(error))
        return found
    found.checked.append(("run root", f"{root.url or root.local} can be written to"))
    return found


def look_here(planned: Planned) -> Preflight:
    """What can be known on this machine, before Ray is started."""
    run, first = planned[0]
    found = look_at_root(run.root)
    # Had they not, there would be no plan.
    found.checked.insert(0, ("recipe", f"{len(first.stages)} stages fit the base, its tokenizer and each other"))
    for number, (each, plan) in enumerate(planned):
        if number == 0 or each.inputs.data != run.inputs.data:
            _look_at_data(each, plan, found)
    _look_at_disk(planned, found)
    _look_at_logins(run.recipe, found)
    return found


def look_there(planned: Planned, devices: Size, nodes: Mapping[str, Facts]) -> Preflight:
    """What the nodes say of themselves, against what the stages to run will take."""
    found, (run, _) = Preflight(), planned[0]
    found.checked += [(f"node {node}", str(facts)) for node, facts in nodes.items()]
    try:
        if any(isinstance(entry.stage, TrainStage) for _, plan in planned for entry in plan.to_run):
            check_compiler(devices)
    except OrchestratorError as error:
        found.problems.append(str(error))
    for node, facts in nodes.items():
        if facts.counted and not facts.devices:
            found.warnings.append(
                f"node {node}: Ray counts {facts.counted} GPUs, and nvidia-smi shows none; see to the driver"
            )
    workers = max(devices.allowed)
    if devices.gpus:
        # A head without a device trains nothing.
        nodes = {node: facts for node, facts in nodes.items() if facts.devices}
    # Of nodes that gave no answer something worse is said.
    for each, plan in planned if nodes else ():
        for forecast in _forecasts(each, plan, workers, bool(devices.gpus)):
            _look_at_memory(forecast, run.recipe.zero, -(-workers // len(nodes)), nodes, found)
    return found


def rehearse(run: Run, plan: Plan, devices: Devices, found: Preflight) -> None:
    """A step at its fullest of every stage whose base is there, by real workers; what it says goes to `found`."""
    from orchestrator.cluster.dry import dry_step  # noqa: PLC0415

    for planned in plan.to_run:
        if not isinstance(planned.stage, TrainStage):
            continue
        base = plan.base_of(planned)
        if base and not base.record:
            found.checked.append((f"dry step of {planned.name}", f"none yet: {base.name} has to make its base first"))
            continue
        outcome = dry_step(_dry_assignment(run, plan, planned, devices), devices.group, run.recipe.recovery)
        if isinstance(outcome, str):
            found.problems.append(f"stages.{planned.name}: its largest step failed: {outcome}")
        else:
            found.checked.append((f"dry step of {planned.name}", _in_words(outcome)))


def nodes_here(run: Run) -> dict[str, Facts]:
    """Of a cluster that is this machine alone."""
    assert isinstance(run.recipe.cluster, LocalCluster)
    return {socket.gethostname(): facts_here(run.root.local)}


def _in_words(step: DryStep) -> str:
    seconds = duration(step.seconds) if step.seconds >= 10 else f"{step.seconds:.2g}s"
    return f"{seconds} for a full batch, {size(step.peak_memory_bytes)} at most in a worker"


def _dry_assignment(run: Run, plan: Plan, planned: PlannedStage, devices: Devices) -> TrainAssignment:
    sources = assign.sources_of(run.root, run.inputs, plan, planned)
    learned = plan.learned_before(planned)
    if learned and not learned.record:
        # Of an adapter that is yet to be learned the shapes are enough.
        exchange = assign.data_sources_of(run.root, run.inputs, plan, planned).exchange
        sources = replace(sources, parent_adapter=None, exchange=exchange)
    return assign.rehearsing(run.recipe, planned, sources, devices.size.cpus)


def _look_at_data(run: Run, plan: Plan, found: Preflight) -> None:
    """Reads all data that the stages to run will learn from: a bad line is found now, not when its stage begins."""
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
    for check, where, files in checks:
        if (check, files) in seen:
            continue
        seen.add((check, files))
        try:
            check(where, files, complain)
        except DataError as error:
            found.problems.append(str(error))
    files = {file.url for _, files in seen for file in files}
    found.checked.append(("data", f"{len(files)} files can be read"))


def _look_at_disk(planned: Planned, found: Preflight) -> None:
    """What the stages will leave, and the largest checkpoint as often as it is kept, against what is free."""
    run, _ = planned[0]
    if run.root.url:
        return
    left: dict[Path, int] = {}
    checkpoints = 0
    for each, plan in planned:
        forecasts = _forecasts(each, plan, 1, False)
        # What several recipes share is left once.
        left |= {plan.named(forecast.name).folder: forecast.artifact_bytes for forecast in forecasts}
        left |= {entry.folder: _whole_model_bytes(each) for entry in plan.to_run if _leaves_whole_model(entry)}
        # One is written beside those that are kept.
        most = max((forecast.checkpoint_bytes for forecast in forecasts), default=0)
        checkpoints = max(checkpoints, most * (each.recipe.checkpoint.keep + 1))
    kept, free = sum(left.values()), free_bytes(run.root.local)
    if kept + checkpoints > free:
        found.problems.append(
            f"run_root: {run.root.local} has {size(free)} free, and the stages to run leave {size(kept)} and up to "
            f"{size(checkpoints)} of checkpoints while they train; make room, name another run_root, or keep fewer "
            "(checkpoint.keep)"
        )
    else:
        found.checked.append(("disk", f"{size(free)} free of {size(kept + checkpoints)} needed, prepared data not counted"))


def _leaves_whole_model(planned: PlannedStage) -> bool:
    """Whether it writes the base's weights again."""
    return isinstance(planned.stage, VocabularyStage | MergeStage) or (
        isinstance(planned.stage, ExportStage) and planned.stage.merged
    )


def _whole_model_bytes(run: Run) -> int:
    """Of the base, in 16 bits and without the rows that a vocabulary adds: less than this it will not be."""
    shape = shape_of(run.inputs.base)
    assert shape, "the base is here"
    return 2 * shape.parameters


def _look_at_logins(recipe: Recipe, found: Preflight) -> None:
    if isinstance(recipe.tracking, WandbTracking):
        logged_in, mode = is_logged_in(), recipe.tracking.mode
        if mode == "online" and not logged_in:
            # No problem: a worker on another machine may be, and nothing of wandb ends a run.
            found.warnings.append(
                "tracking.mode: online, but nobody is logged in to wandb here; run `wandb login` or set WANDB_API_KEY, or "
                "it runs offline"
            )
        else:
            is_online = logged_in and mode != "offline"
            found.checked.append(("wandb", "logged in" if is_online else "offline; `wandb sync` sends it later"))
    is_from_hub = isinstance(recipe.base_model, str) and not Path(recipe.base_model).expanduser().is_dir()
    if is_from_hub:
        has_token = bool(os.environ.get("HF_TOKEN")) or (_hub_home() / "token").is_file()
        found.checked.append(("hub", "logged in" if has_token else "not logged in, which open models do not need"))


def _hub_home() -> Path:
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")


def _forecasts(run: Run, plan: Plan, workers: int, on_gpu: bool) -> list[StageForecast]:
    """Of the training stages to run."""
    shape = shape_of(run.inputs.base)
    assert shape, "the base is here"
    names = {planned.name for planned in plan.to_run}
    found = stage_forecasts(run.recipe, plan, shape, Wanted(workers=workers), on_gpu)
    return [forecast for forecast in found if forecast.name in names]


def _look_at_memory(
    forecast: StageForecast, zero: int, each_node: int, nodes: Mapping[str, Facts], found: Preflight
) -> None:
    wanted = forecast.memory[zero].total
    least = min((facts.device_bytes or facts.memory_bytes // each_node for facts in nodes.values()), default=0)
    what = f"stages.{forecast.name}: a worker will hold about {size(wanted)}"
    if wanted > least:
        found.warnings.append(
            f"{what}, and there are {size(least)} for each; lower resources.micro_batch_size, set "
            "resources.gradient_checkpointing=true, raise zero=, or give it fewer workers a node"
        )
    else:
        found.checked.append((f"memory of {forecast.name}", f"about {size(wanted)} a worker, of {size(least)}"))
