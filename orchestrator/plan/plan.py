"""For each stage: its fingerprint, its folder, and whether it is done or must run, and why.

Fingerprints hold content, never location. A finished stage prunes its ancestors: they need not exist.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from orchestrator.errors import RecipeError
from orchestrator.plan.adaptation import adaptations
from orchestrator.plan.checkpoints import checkpoint_steps
from orchestrator.plan.explain import why_new
from orchestrator.plan.record import Record, read_record
from orchestrator.plan.selection import selected_stages
from orchestrator.schema import ExportStage, HeldOutShare, Reading, Recipe, Stage, TrainStage, VocabularyStage
from orchestrator.store import sha256_value

IDENTITY_FORMAT = 1
_NOT_IDENTITY = {"resources", "log_every_steps", "data", "sentencepiece_model"}


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
    """Content hashes of what a recipe names outside itself."""

    base_model: str
    base_tokenizer: str
    data: dict[str, str]
    """By stage, of each stage that reads data."""
    sentencepiece_model: str | None = None


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

    def parent(self, planned: PlannedStage, kind: type) -> PlannedStage | None:
        """The stage of a kind that this one is made from."""
        parents = (self.named(name) for name in planned.parents)
        return next((parent for parent in parents if isinstance(parent.stage, kind)), None)


def make_plan(recipe: Recipe, contents: Contents, run_root: Path) -> Plan:
    """Plans a recipe; reads records below `run_root` and nothing else, and writes nothing."""
    selected = selected_stages(recipe.stage, tuple(recipe.stages))
    adaptations(recipe)
    _check_order(recipe)
    planned: list[PlannedStage] = []
    for number, (name, stage) in enumerate(recipe.stages.items()):
        parents = {parent.name: parent.fingerprint for parent in _made_from(planned)}
        identity = _identity(name, stage, recipe, contents, parents)
        fingerprint = sha256_value(identity)
        folder = run_root / f"{name}-{fingerprint[:12]}"
        planned.append(
            PlannedStage(number, name, stage, identity, fingerprint, parents, folder, State.SKIP, "", read_record(folder))
        )
    return Plan(_with_states(planned, selected))


def _made_from(before: Sequence[PlannedStage]) -> list[PlannedStage]:
    """The last vocabulary and the last training stage: the one has the base, the other what was learned on it."""
    last = {entry.stage.kind: entry for entry in before if isinstance(entry.stage, VocabularyStage | TrainStage)}
    return list(last.values())


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
        # As long as they change nothing, they are not named, so that what was learned before they existed stays known.
        if recipe.reading != Reading():
            identity["reading"] = recipe.reading.model_dump(mode="json")
        if isinstance(recipe.validation, HeldOutShare) and stage.objective == "next_token":
            identity["held_out_share"] = recipe.validation.share
    if isinstance(stage, VocabularyStage) and stage.sentencepiece_model:
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
    trained, vocabulary = False, ""
    for name, stage in recipe.stages.items():
        if isinstance(stage, VocabularyStage):
            if vocabulary:
                raise RecipeError(
                    f"stages.{name}: there is one vocabulary stage already, stages.{vocabulary}; extend it in one"
                )
            if trained:
                raise RecipeError(f"stages.{name}: a vocabulary stage must come before every training stage")
            vocabulary = name
        trained = trained or isinstance(stage, TrainStage)
        if isinstance(stage, ExportStage) and not trained:
            raise RecipeError(f"stages.{name}: there is no training stage before it whose result could be exported")
