"""What a recipe will take before anything of it runs: parameters, memory, compute, time and cost, from sizes alone."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from orchestrator.contents import base_model_folder
from orchestrator.errors import OrchestratorError, RecipeError
from orchestrator.plan.devices import DEVICES, Device
from orchestrator.plan.inputs import check_credentials, find_inputs
from orchestrator.plan.memory import Memory, Placed, largest_micro_batch, memory
from orchestrator.plan.plan import Contents, Plan, PlannedStage, make_plan
from orchestrator.plan.shape import Learned, ModelShape, learned, shape_of
from orchestrator.run_root import run_root
from orchestrator.schema import RandomBase, Recipe, TrainStage, VocabularyStage

_USABLE = 0.94
"""Of a device's memory; what is left is lost between allocations."""
_LEVELS: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
_CHECKPOINT_BYTES = 12
"""Of each parameter that learns: an fp32 master and two moments."""


@dataclass(frozen=True)
class Wanted:
    """What to plan for."""

    device: str | None = None
    """One of DEVICES; None plans for workers on CPUs."""
    workers: int = 1
    efficiency: float = 0.4
    """Share of the device's peak that training reaches."""
    price: float | None = None
    """Of a device for an hour."""

    @property
    def spec(self) -> Device | None:
        return DEVICES[self.device] if self.device else None


@dataclass(frozen=True)
class StageForecast:
    """One training stage."""

    name: str
    trainable: int
    parameters: int
    """Of the model, with what stands beside it."""
    block_length: int
    global_batch: int
    micro_batch: int
    steps: int | None
    """None where the stage says epochs, and its data is not counted yet."""
    memory: dict[int, Memory]
    """Of a worker, by ZeRO level."""
    largest_micro_batch: int | None
    """That fits the device at the recipe's ZeRO level, 0 where none does; None without a device."""
    artifact_bytes: int
    checkpoint_bytes: int
    step_flops: float
    hours: float | None
    """On all workers together, by the efficiency that was stated."""
    price: float | None
    is_exact: bool = True
    """Whether it is known how many rows embedding and head have; they are as many as can be where it is not."""

    @property
    def tokens(self) -> int | None:
        return None if self.steps is None else self.steps * self.global_batch * self.block_length


@dataclass(frozen=True)
class Forecast:
    """A recipe, stage by stage."""

    plan: Plan
    are_states_known: bool
    """Whether base and data are here, so that it is known what is done."""
    missing: tuple[str, ...]
    """What is not here."""
    stages: tuple[StageForecast, ...]
    wanted: Wanted
    zero: int

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        known = {planned.name: (planned.state.value, planned.reason) for planned in self.plan.stages}
        stages = []
        for stage in self.stages:
            value = asdict(stage)
            value["memory"] = {zero: asdict(each) | {"total": each.total} for zero, each in stage.memory.items()}
            value["tokens"] = stage.tokens
            if self.are_states_known:
                value["state"], value["why"] = known[stage.name]
            stages.append(value)
        return {"zero": self.zero, **asdict(self.wanted), "missing": list(self.missing), "stages": stages}


def forecast(recipe: Recipe, wanted: Wanted) -> Forecast:
    """RecipeError for a recipe that cannot be planned; base and data need not be here for the rest."""
    check_credentials(recipe)
    base, missing = _base(recipe)
    shape = shape_of(base)
    if shape is None:
        raise RecipeError(f"base_model: {base} is not here and its sizes are not known; fetch at least its config.json")
    plan, are_known, absent = _plan(recipe, shape)
    stages = stage_forecasts(recipe, plan, shape, wanted, bool(wanted.spec))
    return Forecast(plan, are_known, tuple(dict.fromkeys((*missing, *absent))), stages, wanted, recipe.zero)


def stage_forecasts(
    recipe: Recipe, plan: Plan, shape: ModelShape, wanted: Wanted, on_gpu: bool
) -> tuple[StageForecast, ...]:
    """Of every training stage; `shape` is the base's."""
    stages, first, is_exact = [], shape.rows, True
    for planned in plan.stages:
        if isinstance(planned.stage, VocabularyStage):
            new = 0 if planned.stage.merge == "none" else planned.stage.pieces
            shape, is_exact = _extended(shape, planned, new), bool(planned.record) or not new
        elif isinstance(planned.stage, TrainStage):
            assert planned.adaptation
            learns = learned(shape, planned.adaptation, shape.rows - first)
            stages.append(replace(_stage(recipe, planned, shape, learns, wanted, on_gpu), is_exact=is_exact))
    return tuple(stages)


def _base(recipe: Recipe) -> tuple[Path | RandomBase | str, list[str]]:
    if isinstance(recipe.base_model, RandomBase):
        return recipe.base_model, []
    try:
        return base_model_folder(recipe.base_model), []
    except OrchestratorError as error:
        return recipe.base_model, [str(error)]


def _plan(recipe: Recipe, shape: ModelShape) -> tuple[Plan, bool, tuple[str, ...]]:
    root = run_root(recipe.run_root)
    try:
        contents = find_inputs(recipe).contents
    except RecipeError as error:
        nothing = Contents("", "", {}, None, shape.layer_names)
        return make_plan(recipe, nothing, root.local), False, error.problems
    root.fetch_records()
    return make_plan(recipe, contents, root.local), True, ()


def _extended(shape: ModelShape, planned: PlannedStage, pieces: int) -> ModelShape:
    """By as many rows as the stage has made, or may at most."""
    stage = planned.stage
    assert isinstance(stage, VocabularyStage)
    if planned.record and "rows" in planned.record.results:
        return shape.with_rows(planned.record.results["rows"])
    rows = shape.rows + pieces
    return shape.with_rows(-(-rows // stage.pad_to_multiple) * stage.pad_to_multiple)


def _stage(
    recipe: Recipe, planned: PlannedStage, shape: ModelShape, learns: Learned, wanted: Wanted, on_gpu: bool
) -> StageForecast:
    stage = planned.stage
    assert isinstance(stage, TrainStage)
    placed = Placed(recipe.zero, wanted.workers, stage.resources.micro_batch_size, recipe.precision, on_gpu)
    flops = step_flops(shape, learns, stage)
    hours = price = most = None
    if spec := wanted.spec:
        most = largest_micro_batch(shape, learns, stage, placed, _USABLE * spec.memory)
        if stage.steps:
            hours = stage.steps * flops / (wanted.workers * spec.flops * wanted.efficiency) / 3600
            price = None if wanted.price is None else hours * wanted.workers * wanted.price
    artifact = shape.parameters if planned.is_base else learns.trainable
    return StageForecast(
        name=planned.name,
        trainable=learns.trainable,
        parameters=shape.parameters + learns.added,
        block_length=stage.block_length,
        global_batch=stage.global_batch_size,
        micro_batch=stage.resources.micro_batch_size,
        steps=stage.steps or (planned.record.results["steps"] if planned.record else None),
        memory={zero: memory(shape, learns, stage, replace(placed, zero=zero)) for zero in _LEVELS},
        largest_micro_batch=most,
        artifact_bytes=artifact * (4 if recipe.precision == "fp32" else 2),
        checkpoint_bytes=learns.trainable * _CHECKPOINT_BYTES,
        step_flops=flops,
        hours=hours,
        price=price,
    )


def step_flops(shape: ModelShape, learns: Learned, stage: TrainStage) -> float:
    """Operations of a step whose every position carries loss, as model/flops.py counts them."""
    forwards = 2 if stage.resources.gradient_checkpointing else 1
    tokens = stage.global_batch_size * stage.block_length
    matrices = shape.body + learns.added
    body = 2.0 * (matrices * (forwards + 1) + learns.in_blocks)
    width = shape.heads * shape.head_size
    attention = 4.0 * width * shape.layers * (forwards + 2) * (stage.block_length + 1) / 2
    head = 2.0 * shape.table * (2 + learns.head)
    return tokens * (body + attention + head)
