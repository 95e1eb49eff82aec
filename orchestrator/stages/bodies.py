"""The bodies of the stages as the cluster calls them: imports wait until a worker runs them, so a driver starts at once."""

# ruff: noqa: PLC0415

from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.contents import DataFile
from orchestrator.data.part import Preparation
from orchestrator.schema import EvaluationStage, ExportStage, MergeStage, RandomBase, VocabularyStage
from orchestrator.stages.assignment import (
    DryStep,
    EvaluationAssignment,
    ExportAssignment,
    TrainAssignment,
    TrainEnding,
)
from orchestrator.stages.exchange import DATA_NAME, Exchange
from orchestrator.train.link import Link


def exchanging_body(exchange: Exchange, body: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """A body on any machine: what it needs is brought there first, and what it made handed over."""
    exchange.bring()
    if exchange.root.url:
        # The command has done so on its own machine, which need not be this one.
        exchange.clear()
    results = body(*arguments)
    exchange.hand_over()
    return results


def vocabulary_body(
    stage: VocabularyStage,
    base: Path | RandomBase,
    text: tuple[DataFile, ...],
    base_text: tuple[DataFile, ...],
    folder: Path,
    seed: int,
) -> dict[str, Any]:
    from orchestrator.stages.vocabulary import run_vocabulary

    return run_vocabulary(stage, base, text=text, base_text=base_text, folder=folder, seed=seed)


def train_body(assignment: TrainAssignment, link: Link) -> TrainEnding:
    from orchestrator.stages.train import run_train

    return run_train(assignment, link)


def dry_body(assignment: TrainAssignment, link: Link) -> DryStep:
    from orchestrator.stages.dry import run_dry

    return run_dry(assignment, link)


def export_body(stage: ExportStage, assignment: ExportAssignment) -> dict[str, Any]:
    from orchestrator.stages.export import run_export

    return run_export(stage, assignment)


def merge_body(stage: MergeStage, assignment: ExportAssignment) -> dict[str, Any]:
    from orchestrator.stages.export import run_merge

    return run_merge(stage, assignment)


def evaluation_body(stage: EvaluationStage, assignment: EvaluationAssignment) -> dict[str, Any]:
    from orchestrator.stages.evaluation import run_evaluation

    return run_evaluation(stage, assignment)


def latency_body(base: Path, adapter: Path | None, can_merge: bool, precision: str, tokens: int) -> dict[str, float]:
    from orchestrator.stages.latency import run_latency

    return run_latency(base, adapter, can_merge, precision, tokens)


def prepare_body(exchange: Exchange, preparation: Preparation, worth_bytes: int | None = None) -> tuple[Path, int]:
    """The folder of prepared data, and how many rows it has; more than `worth_bytes` is prepared by the whole cluster."""
    from orchestrator.data.parallel import WORTH_BYTES, on_ray
    from orchestrator.data.prepare import prepare
    from orchestrator.data.rows import PreparedRows

    exchange.bring()
    # With an object store each node has a mirror of its own.
    crew = on_ray(exchange.root.url is not None, WORTH_BYTES if worth_bytes is None else worth_bytes)
    folder = prepare(preparation, exchange.root.local, crew)
    exchange.root.publish(folder.name, DATA_NAME)
    return folder, len(PreparedRows.open(folder))
