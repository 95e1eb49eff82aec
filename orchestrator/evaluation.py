"""What an evaluation stage is told: which models there are, and on what each is measured."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.assign import held_out_preparations, run_description, sources_of
from orchestrator.data.part import Preparation
from orchestrator.data.templates import Manner
from orchestrator.plan.inputs import Inputs, read_prompts
from orchestrator.plan.plan import Plan, PlannedStage
from orchestrator.run_root import RunRoot
from orchestrator.schema import EvaluationStage, ExportStage, Recipe, TrainStage, VocabularyStage
from orchestrator.stages.assignment import EvaluatedModel, EvaluationAssignment, HeldOut

Prepare = Callable[[Preparation], Path]
"""The folder of prepared data, made now or found."""


@dataclass(frozen=True)
class _Model:
    """One that is there to be measured."""

    name: str
    base: Path
    tokenizer: Path
    adapter: Path | None = None


def evaluating(
    recipe: Recipe, inputs: Inputs, root: RunRoot, plan: Plan, planned: PlannedStage, prepare: Prepare, threads: int
) -> EvaluationAssignment:
    """The assignment of an evaluation; what is held out is prepared for each tokenizer."""
    stage = planned.stage
    assert isinstance(stage, EvaluationStage)
    models = _models(inputs, root, plan, planned)
    if stage.models == "last":
        models = models[-1:]
    held_out: dict[Path, tuple[HeldOut, ...]] = {}
    for model in models:
        if model.tokenizer not in held_out:
            wanted = held_out_preparations(recipe, inputs, model.tokenizer)
            held_out[model.tokenizer] = tuple(HeldOut(name, prepare(each)) for name, each in wanted.items())
    return EvaluationAssignment(
        models=tuple(
            EvaluatedModel(
                model.name, model.base, model.tokenizer, model.adapter, held_out[model.tokenizer], _manner(plan, model.name)
            )
            for model in models
        ),
        prompts=recipe.evaluation.prompts if stage.prompts is None else read_prompts(planned.name, stage),
        folder=planned.folder,
        precision=recipe.precision,
        threads=threads,
        tracking=recipe.tracking,
        run=run_description(recipe, planned),
    )


def _models(inputs: Inputs, root: RunRoot, plan: Plan, planned: PlannedStage) -> list[_Model]:
    """The user's own base, and what each stage left that this one is made from."""
    found = [_Model("base", inputs.base, inputs.base)] if isinstance(inputs.base, Path) else []
    for name in planned.parents:
        entry = plan.named(name)
        match entry.stage:
            case VocabularyStage(merge="none") if found:
                # It is the base.
                continue
            case ExportStage(merged=merged):
                folder = entry.folder / "merged"
                found += [_Model(name, folder, folder)] if merged else []
            case TrainStage() if not entry.is_base:
                sources = sources_of(root, inputs, plan, entry)
                found.append(_Model(name, sources.base, sources.tokenizer, entry.folder / "adapter"))
            case _:
                found.append(_Model(name, *entry.base_folders))
    return found


def _manner(plan: Plan, name: str) -> Manner:
    """As the last stage put it that taught the model to answer; what has not been taught goes on with text."""
    # The user's own base is no stage.
    number = next((entry.number for entry in plan.stages if entry.name == name), -1)
    stages = [entry.stage for entry in plan.stages[: number + 1]]
    taught = [stage.template for stage in stages if isinstance(stage, TrainStage) and stage.objective == "answers"]
    return taught[-1] if taught else "plain"
