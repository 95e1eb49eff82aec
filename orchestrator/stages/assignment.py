"""All that a worker needs to know to train one stage; plain values, so that it travels to another machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.checkpoint.manifest import Origin
from orchestrator.data.templates import Manner
from orchestrator.plan.adaptation import Adaptation
from orchestrator.schema import CheckpointPolicy, Evaluation, Tracking, TrainStage
from orchestrator.stages.exchange import Exchange
from orchestrator.tracking import RunDescription


@dataclass(frozen=True)
class HeldOut:
    """Prepared text that is evaluated, never learned."""

    name: str
    rows: Path


@dataclass(frozen=True)
class TrainAssignment:
    """One training stage, as its workers see it."""

    stage: TrainStage
    adaptation: Adaptation
    base: Path
    tokenizer: Path
    parent_adapter: Path | None
    base_tokens: int | None
    """Rows of the tables before those of the tokens that were added; None where none were."""
    rows: Path
    """Prepared data to learn from."""
    held_out: tuple[HeldOut, ...]
    folder: Path
    origin: Origin
    num_steps: int
    micro_batch_size: int
    """Sequences at once on a device; less than the stage's own after it ran out of memory."""
    seed: int
    precision: Literal["bf16", "fp16", "fp32"]
    zero: Literal[0, 1, 2, 3]
    threads: int
    """CPU threads of each worker."""
    checkpoint: CheckpointPolicy
    evaluation: Evaluation
    bad_steps: int
    """In a row, before training stops."""
    tracking: Tracking
    run: RunDescription
    exchange: Exchange


@dataclass(frozen=True)
class DryStep:
    """What a step at its fullest took."""

    seconds: float
    peak_memory_bytes: int
    """Of the worker that held most."""


@dataclass(frozen=True)
class TrainEnding:
    """How far the ranks came before they left in order."""

    step: int
    completed: bool


def results_file(folder: Path) -> Path:
    """Where rank 0 leaves a stage's results for the driver."""
    return folder / "work" / "results.json"


Results = dict[str, Any]


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with what was learned on it, and what it is measured on in its own tokens."""

    name: str
    base: Path
    tokenizer: Path
    adapter: Path | None
    held_out: tuple[HeldOut, ...]
    manner: Manner
    """How prompts are put to it."""


@dataclass(frozen=True)
class EvaluationAssignment:
    """What is measured side by side."""

    models: tuple[EvaluatedModel, ...]
    prompts: tuple[str, ...]
    folder: Path
    precision: Literal["bf16", "fp16", "fp32"]
    threads: int
    tracking: Tracking
    run: RunDescription


@dataclass(frozen=True)
class ExportAssignment:
    """What is exported or merged, and from what."""

    base: Path
    tokenizer: Path
    adapter: Path | None
    """What was learned on the base; None where that is in the base itself."""
    folder: Path
    precision: Literal["bf16", "fp16", "fp32"]
    origin: Origin
    cards: Mapping[str, str] = field(default_factory=dict)
    """The README.md of `adapter` and `merged`, which a hub shows."""
