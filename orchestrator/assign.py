"""What each stage is told: the plan's stages as plain assignments for the bodies that carry them out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.checkpoint.manifest import Origin
from orchestrator.contents import base_model_hash, tokenizer_hash
from orchestrator.data.choice import Choice, Split
from orchestrator.data.part import Preparation
from orchestrator.plan.adaptation import adaptations
from orchestrator.plan.inputs import Inputs
from orchestrator.plan.plan import Plan, PlannedStage
from orchestrator.run_root import RunRoot
from orchestrator.schema import HeldOutShare, RandomBase, Recipe, TrainStage, VocabularyStage
from orchestrator.stages.assignment import ExportAssignment, HeldOut, TrainAssignment
from orchestrator.stages.exchange import Exchange
from orchestrator.tracking import RunDescription


@dataclass(frozen=True)
class Sources:
    """What a stage starts from."""

    base: Path
    tokenizer: Path
    parent_adapter: Path | None
    base_tokens: int | None
    """Before any were added; None where none were."""
    exchange: Exchange
    """How it comes to where the stage runs."""


def exchange_of(root: RunRoot, plan: Plan, planned: PlannedStage) -> Exchange:
    """A stage is made from its parents' folders, and leaves its own."""
    return Exchange.of(root, planned.folder.name, [plan.named(parent).folder.name for parent in planned.parents])


def sources_of(root: RunRoot, inputs: Inputs, plan: Plan, planned: PlannedStage) -> Sources:
    """Base and tokenizer of the vocabulary stage, or the user's own, and the adapter of the training stage before."""
    trained = plan.parent(planned, TrainStage)
    base, tokenizer = _base_and_tokenizer(inputs, plan, planned)
    adapter = trained.folder / "adapter" if trained else None
    vocabulary = plan.parent(planned, VocabularyStage)
    base_tokens = vocabulary.record.results["base_tokens"] if vocabulary and vocabulary.record else None
    return Sources(base, tokenizer, adapter, base_tokens, exchange_of(root, plan, planned))


def data_sources_of(root: RunRoot, inputs: Inputs, plan: Plan, planned: PlannedStage) -> Sources:
    """The same for its data alone, which needs nothing of what is learned before."""
    vocabulary = plan.parent(planned, VocabularyStage)
    parents = [vocabulary.folder.name] if vocabulary else []
    base, tokenizer = _base_and_tokenizer(inputs, plan, planned)
    return Sources(base, tokenizer, None, None, Exchange.of(root, planned.folder.name, parents))


def _base_and_tokenizer(inputs: Inputs, plan: Plan, planned: PlannedStage) -> tuple[Path, Path]:
    if vocabulary := plan.parent(planned, VocabularyStage):
        return vocabulary.folder / "base", vocabulary.folder / "tokenizer"
    assert not isinstance(inputs.base, RandomBase)
    return inputs.base, inputs.base


def all_preparations(recipe: Recipe, inputs: Inputs, planned: PlannedStage, tokenizer: Path) -> list[Preparation]:
    """What a training stage learns from and what it is measured on."""
    held_out = held_out_preparations(recipe, inputs, tokenizer)
    return [preparation(recipe, inputs, planned, tokenizer), *held_out.values()]


def preparation(recipe: Recipe, inputs: Inputs, planned: PlannedStage, tokenizer: Path) -> Preparation:
    """What a training stage learns from."""
    stage = _training_stage(planned)
    is_text = stage.objective == "next_token"
    return Preparation(
        objective=stage.objective,
        tokenizer=tokenizer,
        field=f"stages.{planned.name}",
        files=inputs.data[planned.name],
        block_length=stage.block_length,
        template=stage.template,
        packing=stage.packing,
        choice=_choice(recipe, _split(recipe, "learned") if is_text else None),
    )


def held_out_preparations(recipe: Recipe, inputs: Inputs, tokenizer: Path) -> dict[str, Preparation]:
    """The texts that are evaluated before and after a training stage, by name.

    All stages see them in windows of the same length, so that their numbers compare.
    """
    window = min(stage.block_length for stage in recipe.stages.values() if isinstance(stage, TrainStage))
    found = {}
    for name, files in inputs.held_out.items():
        choice = _choice(recipe, _split(recipe, "held_out") if name == "validation" else None)
        found[name] = Preparation("held_out", tokenizer, name, files, window, choice=choice)
    return found


def _choice(recipe: Recipe, split: Split | None) -> Choice:
    return Choice(recipe.reading.bad_records, recipe.reading.deduplicate, split, recipe.seed)


def _split(recipe: Recipe, side: Literal["learned", "held_out"]) -> Split | None:
    return Split(recipe.validation.share, side) if isinstance(recipe.validation, HeldOutShare) else None


def training(
    recipe: Recipe,
    planned: PlannedStage,
    sources: Sources,
    rows: tuple[Path, int],
    held_out: tuple[HeldOut, ...],
    threads: int,
) -> TrainAssignment:
    """The assignment of a training stage; `rows` is the prepared data and how many rows it has."""
    stage = _training_stage(planned)
    num_steps = stage.steps or math.ceil((stage.epochs or 0) * rows[1] / stage.global_batch_size)
    origin = Origin(
        stage=planned.name,
        fingerprint=planned.fingerprint,
        parents=planned.parents,
        base_name=str(sources.base),
        base_hash=base_model_hash(sources.base),
        tokenizer_hash=tokenizer_hash(sources.tokenizer),
        step=num_steps,
    )
    return TrainAssignment(
        stage=stage,
        adaptation=adaptations(recipe)[planned.name],
        base=sources.base,
        tokenizer=sources.tokenizer,
        parent_adapter=sources.parent_adapter,
        base_tokens=sources.base_tokens,
        rows=rows[0],
        held_out=held_out,
        folder=planned.folder,
        origin=origin,
        num_steps=num_steps,
        micro_batch_size=stage.resources.micro_batch_size,
        seed=recipe.seed,
        precision=recipe.precision,
        zero=recipe.zero,
        threads=threads,
        checkpoint=recipe.checkpoint,
        bad_steps=recipe.recovery.bad_steps,
        tracking=recipe.tracking,
        run=_run_description(recipe, planned),
        exchange=sources.exchange.with_data((rows[0], *(text.rows for text in held_out))),
    )


def exporting(recipe: Recipe, sources: Sources, plan: Plan, planned: PlannedStage) -> ExportAssignment:
    """The assignment of an export stage: the last training stage's adapter."""
    trained = plan.parent(planned, TrainStage)
    assert trained
    assert sources.parent_adapter
    return ExportAssignment(
        base=sources.base,
        tokenizer=sources.tokenizer,
        adapter=sources.parent_adapter,
        adaptation=adaptations(recipe)[trained.name],
        folder=planned.folder,
        precision=recipe.precision,
    )


def reference(plan: Plan, planned: PlannedStage, results: dict[str, Any], held_out: Sequence[HeldOut]) -> dict[str, Any]:
    """The held-out numbers of the base model, which the first training stage measured and each passes on.

    Where the text is another than that stage's, the numbers before this stage are the nearest there is.
    """
    trained = plan.parent(planned, TrainStage)
    earlier = trained.record.results["reference"] if trained and trained.record else {}
    found = {}
    for text in held_out:
        own = {**results["held_out"][text.name]["before"], "data": text.rows.name}
        known = earlier.get(text.name, {})
        found[text.name] = known if known.get("data") == text.rows.name else own
    return found


def _run_description(recipe: Recipe, planned: PlannedStage) -> RunDescription:
    return RunDescription(
        id=planned.folder.name,
        name=planned.folder.name,
        group=f"{recipe.name}/{planned.folder.parent.name}",
        job_type=planned.name,
        tags=(recipe.name, planned.name),
        config={
            "recipe": recipe.model_dump(mode="json"),
            "stage": planned.name,
            "fingerprint": planned.fingerprint,
            "parents": planned.parents,
        },
        folder=planned.folder,
    )


def _training_stage(planned: PlannedStage) -> TrainStage:
    assert isinstance(planned.stage, TrainStage)
    return planned.stage
