"""What each stage is told: the plan's stages as plain assignments for the bodies that carry them out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from orchestrator.checkpoint.manifest import Origin
from orchestrator.contents import base_model_hash, tokenizer_hash
from orchestrator.data.choice import Choice, Split
from orchestrator.data.part import Preparation
from orchestrator.data.prepare import find_prepared
from orchestrator.data.summary import Summary, read_summary
from orchestrator.plan.inputs import Inputs
from orchestrator.plan.plan import Plan, PlannedStage
from orchestrator.run_root import RunRoot
from orchestrator.schema import HeldOutShare, RandomBase, Recipe, TrainStage
from orchestrator.stages.assignment import ExportAssignment, HeldOut, TrainAssignment
from orchestrator.stages.exchange import Exchange
from orchestrator.tracking import RunDescription

_WINDOW = 512
"""Tokens in a window of held-out text, where no stage learns."""


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
    """The model and tokenizer that an earlier stage left, or the user's own, and what was learned on it before."""
    base_stage, learned = plan.base_of(planned), plan.learned_before(planned)
    base, tokenizer = base_stage.base_folders if base_stage else _own_base(inputs)
    adapter = learned.folder / "adapter" if learned else None
    base_tokens = base_stage.record.results.get("base_tokens") if base_stage and base_stage.record else None
    return Sources(base, tokenizer, adapter, base_tokens, exchange_of(root, plan, planned))


def data_sources_of(root: RunRoot, inputs: Inputs, plan: Plan, planned: PlannedStage) -> Sources:
    """The same for its data alone, which needs nothing of what is learned before."""
    found = plan.tokenizer_of(planned)
    parents = [found.folder.name] if found else []
    base, tokenizer = found.base_folders if found else _own_base(inputs)
    return Sources(base, tokenizer, None, None, Exchange.of(root, planned.folder.name, parents))


def _own_base(inputs: Inputs) -> tuple[Path, Path]:
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
    """What is evaluated before and after a training stage, by name.

    All stages see it in windows of the same length, so that their numbers compare.
    """
    trained = [stage for stage in recipe.stages.values() if isinstance(stage, TrainStage)]
    window = min((stage.block_length for stage in trained), default=_WINDOW)
    found = {}
    for name, files in inputs.held_out.items():
        if name == "instructions":
            # Put as they are learned, where they are.
            stage = next((stage for stage in trained if stage.objective == "answers"), next(iter(trained), None))
            found[name] = Preparation(
                "held_out_answers",
                tokenizer,
                "validation_instructions",
                files,
                block_length=stage.block_length if stage else _WINDOW,
                template=stage.template if stage else "alpaca",
                choice=_choice(recipe, None),
            )
            continue
        choice = _choice(recipe, _split(recipe, "held_out") if name == "validation" else None)
        found[name] = Preparation("held_out", tokenizer, name, files, window, choice=choice)
    return found


def prepared_data(recipe: Recipe, inputs: Inputs, root: RunRoot, plan: Plan) -> dict[str, Summary]:
    """What is known of the data of each training stage: where its tokenizer is there and it was tokenized before."""
    found: dict[str, Summary] = {}
    for planned in plan.stages:
        if not isinstance(planned.stage, TrainStage):
            continue
        maker = plan.tokenizer_of(planned)
        if maker and not maker.record:
            continue
        tokenizer = data_sources_of(root, inputs, plan, planned).tokenizer
        known = find_prepared(preparation(recipe, inputs, planned, tokenizer), root.local) if tokenizer.is_dir() else None
        if known and (summary := read_summary(known[0])):
            found[planned.name] = summary
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
    origin = _origin(planned, sources, num_steps)
    assert planned.adaptation
    return TrainAssignment(
        stage=stage,
        adaptation=planned.adaptation,
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
        evaluation=recipe.evaluation,
        bad_steps=recipe.recovery.bad_steps,
        tracking=recipe.tracking,
        run=run_description(recipe, planned),
        exchange=sources.exchange.with_data((rows[0], *(text.rows for text in held_out))),
    )


def rehearsing(recipe: Recipe, planned: PlannedStage, sources: Sources, threads: int) -> TrainAssignment:
    """The same for a dry step, which reads no data."""
    return replace(training(recipe, planned, sources, (planned.folder, 0), (), threads), exchange=sources.exchange)


def exporting(
    recipe: Recipe, sources: Sources, planned: PlannedStage, cards: Mapping[str, str] | None = None
) -> ExportAssignment:
    """The assignment of an export or a merge: the last model, and the adapter that was learned on it, where one was."""
    return ExportAssignment(
        base=sources.base,
        tokenizer=sources.tokenizer,
        adapter=sources.parent_adapter,
        folder=planned.folder,
        precision=recipe.precision,
        origin=_origin(planned, sources, 0),
        cards=cards or {},
    )


def passed_on(plan: Plan, planned: PlannedStage) -> dict[str, Any]:
    """What a stage that leaves a model repeats of those that it was made from, which need not exist any more."""
    results: dict[str, Any] = {}
    for parent in (plan.base_of(planned), plan.learned_before(planned)):
        results |= parent.record.results if parent and parent.record else {}
    return {name: results[name] for name in ("base_tokens", "reference") if results.get(name)}


def _origin(planned: PlannedStage, sources: Sources, num_steps: int) -> Origin:
    return Origin(
        stage=planned.name,
        fingerprint=planned.fingerprint,
        parents=planned.parents,
        base_name=str(sources.base),
        base_hash=base_model_hash(sources.base),
        tokenizer_hash=tokenizer_hash(sources.tokenizer),
        step=num_steps,
    )


def reference(plan: Plan, planned: PlannedStage, results: dict[str, Any], held_out: Sequence[HeldOut]) -> dict[str, Any]:
    """The held-out numbers of the base model, which the first training stage measured and each passes on.

    Where the text is another than that stage's, the numbers before this stage are the nearest there is.
    """
    earlier = passed_on(plan, planned).get("reference", {})
    found = {}
    for text in held_out:
        own = {**results["held_out"][text.name]["before"], "data": text.rows.name}
        known = earlier.get(text.name, {})
        found[text.name] = known if known.get("data") == text.rows.name else own
    return found


def run_description(recipe: Recipe, planned: PlannedStage) -> RunDescription:
    """What a stage is called in wandb."""
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
