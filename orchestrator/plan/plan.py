"""For each stage: its fingerprint, its folder, and whether it is done or must run, and why.

Fingerprints hold content, never location. A finished stage prunes its ancestors: they need not exist.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from orchestrator.errors import RecipeError
from orchestrator.plan.adaptation import Adaptation, adaptations
from orchestrator.plan.checkpoints import checkpoint_steps
from orchestrator.plan.explain import why_new
from orchestrator.plan.record import Record, read_record
from orchestrator.plan.selection import selected_stages
from orchestrator.schema import (
    EvaluationStage,
    ExportStage,
    HeldOutShare,
    MergeStage,
    Reading,
    Recipe,
    Stage,
    TrainStage,
    VocabularyStage,
    WholeModelMethod,
)
from orchestrator.store import sha256_value

IDENTITY_FORMAT = 1
_NOT_IDENTITY = {"resources", "log_every_steps", "data", "sentencepiece_model", "prompts", "task_folder"}
_NAMED_IF_CHANGED = ("quantization", "optimizer", "keep_best")
"""Of a training stage: what was learned before these existed stays known."""


class State(StrEnum):
    """What the pipeline does with a stage."""

    DONE = "DONE"
    RESUME = "RESUME"
    """Began, and goes on from its newest checkpoint."""
    RUN = "RUN"
    SKIP = "SKIP"
    """Not done, and neither asked for nor needed."""


@dataclass(frozen=True)
class Contents:
    """Content hashes of what a recipe names outside itself, and the base's layers."""

    base_model: str
    base_tokenizer: str
    data: dict[str, str]
    """By stage, of each stage that reads data, or prompts and tasks."""
    sentencepiece_model: str | None = None
    linear_layers: tuple[str, ...] = ()
    """Full names of those in the base's blocks."""
    held_out: dict[str, str] = field(default_factory=dict)
    """By the name of each held-out set."""


@dataclass(frozen=True)
class PlannedStage:
    """One stage of the plan."""

    number: int
    name: str
    stage: Stage
    identity: dict[str, Any]
    fingerprint: str
    parents: dict[str, str]
    folder: Path
    state: State
    reason: str
    record: Record | None
    adaptation: Adaptation | None = None
    """Of a training stage."""

    @property
    def is_base(self) -> bool:
        """Whether it leaves a whole model, which later stages start from."""
        return is_base(self.stage)

    @property
    def base_folders(self) -> tuple[Path, Path]:
        """The model that it leaves, and its tokenizer."""
        if isinstance(self.stage, VocabularyStage):
            return self.folder / "base", self.folder / "tokenizer"
        return self.folder / "model", self.folder / "model"


def is_base(stage: Stage) -> bool:
    """Whether a stage leaves a whole model, which later stages start from."""
    return isinstance(stage, VocabularyStage | MergeStage) or (
        isinstance(stage, TrainStage) and isinstance(stage.method, WholeModelMethod)
    )


@dataclass(frozen=True)
class Plan:
    """All stages of a recipe, in order."""

    stages: tuple[PlannedStage, ...]

    @property
    def to_run(self) -> tuple[PlannedStage, ...]:
        return tuple(planned for planned in self.stages if planned.state in (State.RUN, State.RESUME))

    def with_record(self, name: str, record: Record) -> "Plan":
        """The plan once a stage is done."""
        done = [replace(entry, state=State.DONE, record=record) if entry.name == name else entry for entry in self.stages]
        return Plan(tuple(done))

    def named(self, name: str) -> PlannedStage:
        return next(planned for planned in self.stages if planned.name == name)

    def base_of(self, planned: PlannedStage) -> PlannedStage | None:
        """The stage that left the model which this one starts from; None where that is the user's own."""
        return next((parent for parent in self._parents(planned) if parent.is_base), None)

    def learned_before(self, planned: PlannedStage) -> PlannedStage | None:
        """The stage that left the adapter which this one goes on with."""
        return next((parent for parent in self._parents(planned) if not parent.is_base), None)

    def tokenizer_of(self, planned: PlannedStage) -> PlannedStage | None:
        """A stage that left, or will leave, this one's tokenizer; one that is done, where there is any."""
        before = [entry for entry in self.stages[: planned.number] if entry.is_base]
        done = [entry for entry in before if entry.record]
        vocabularies = [entry for entry in before if isinstance(entry.stage, VocabularyStage)]
        return next(reversed(done), None) or next(iter(vocabularies), None)

    def _parents(self, planned: PlannedStage) -> list[PlannedStage]:
        return [self.named(name) for name in planned.parents]


def make_plan(recipe: Recipe, contents: Contents, run_root: Path) -> Plan:
    """Plans a recipe; reads records below `run_root` and nothing else, and writes nothing."""
    selected = selected_stages(recipe.stage, tuple(recipe.stages))
    adapted = adaptations(recipe, contents.linear_layers)
    _check_order(recipe)
    planned: list[PlannedStage] = []
    for number, (name, stage) in enumerate(recipe.stages.items()):
        parents = {parent.name: parent.fingerprint for parent in _made_from(planned, stage)}
        identity = _identity(name, stage, recipe, contents, parents)
        fingerprint = sha256_value(identity)
        folder = run_root / f"{name}-{fingerprint[:12]}"
        record, adaptation = read_record(folder), adapted.get(name)
        planned.append(
            PlannedStage(number, name, stage, identity, fingerprint, parents, folder, State.SKIP, "", record, adaptation)
        )
    return Plan(_with_states(planned, selected))


def _made_from(before: Sequence[PlannedStage], stage: Stage) -> list[PlannedStage]:
    """The last stage that left a model, and the last after it that learned something on that.

    What measures all models is made from every stage that left one.
    """
    if isinstance(stage, EvaluationStage) and stage.models == "all":
        return [entry for entry in before if not isinstance(entry.stage, EvaluationStage)]
    base: PlannedStage | None = None
    learned: PlannedStage | None = None
    for entry in before:
        if entry.is_base:
            base, learned = entry, None
        elif isinstance(entry.stage, TrainStage):
            learned = entry
    return [entry for entry in (base, learned) if entry]


def _identity(name: str, stage: Stage, recipe: Recipe, contents: Contents, parents: dict[str, str]) -> dict[str, Any]:
    identity: dict[str, Any] = {
        "format": IDENTITY_FORMAT,
        "stage": stage.model_dump(mode="json", exclude=_NOT_IDENTITY),
        "seed": recipe.seed,
        "parents": parents,
    }
    if not parents:
        identity |= {"base_model": contents.base_model, "base_tokenizer": contents.base_tokenizer}
    if isinstance(stage, TrainStage):
        identity["precision"] = recipe.precision
        for option in _NAMED_IF_CHANGED:
            if getattr(stage, option) == TrainStage.model_fields[option].default:
                del identity["stage"][option]
        # As long as they change nothing, they are not named, so that what was learned before they existed stays known.
        if recipe.reading != Reading():
            identity["reading"] = recipe.reading.model_dump(mode="json")
        if isinstance(recipe.validation, HeldOutShare) and stage.objective == "next_token":
            identity["held_out_share"] = recipe.validation.share
        if stage.keep_best:
            identity["judged_by"] = contents.held_out.get(stage.keep_best.of)
    if isinstance(stage, EvaluationStage):
        identity |= {"precision": recipe.precision, "held_out": contents.held_out, "data": contents.data.get(name)}
        identity["prompts"] = list(recipe.evaluation.prompts) if stage.prompts is None else None
    elif isinstance(stage, VocabularyStage) and stage.sentencepiece_model:
        identity["sentencepiece_model"] = contents.sentencepiece_model
    elif name in contents.data:
        identity["data"] = contents.data[name]
    return identity


def _with_states(planned: Sequence[PlannedStage], selected: Sequence[str]) -> tuple[PlannedStage, ...]:
    """Walks back from the last stage: one that runs needs its parents, one that is done needs nothing."""
    wanted = set(selected)
    decided: list[PlannedStage] = []
    for entry in reversed(planned):
        if entry.record:
            decided.append(replace(entry, state=State.DONE, reason="its record is there"))
        elif entry.name not in wanted:
            decided.append(replace(entry, reason="not asked for"))
        else:
            wanted |= set(entry.parents)
            needed = "" if entry.name in selected else "needed by a later stage; "
            state, reason = _to_do(entry)
            decided.append(replace(entry, state=state, reason=needed + reason))
    return tuple(reversed(decided))


def _to_do(entry: PlannedStage) -> tuple[State, str]:
    if steps := checkpoint_steps(entry.folder):
        return State.RESUME, f"goes on from step {steps[-1]:,}"
    return State.RUN, why_new(entry.name, entry.identity, entry.folder)


def _check_order(recipe: Recipe) -> None:
    trained, has_adapter, vocabulary = False, False, ""
    for name, stage in recipe.stages.items():
        if isinstance(stage, VocabularyStage):
            if vocabulary:
                raise RecipeError(
                    f"stages.{name}: there is one vocabulary stage already, stages.{vocabulary}; extend it in one"
                )
            if trained:
                raise RecipeError(f"stages.{name}: a vocabulary stage must come before every training stage")
            vocabulary = name
        if isinstance(stage, MergeStage) and not has_adapter:
            raise RecipeError(f"stages.{name}: there is no training stage before it whose adapter could be merged")
        trained = trained or isinstance(stage, TrainStage)
        has_adapter = not is_base(stage) and (has_adapter or isinstance(stage, TrainStage))
        if isinstance(stage, ExportStage) and not trained:
            raise RecipeError(f"stages.{name}: there is no training stage before it whose result could be exported")
