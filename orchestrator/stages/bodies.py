"""The bodies of the stages as the cluster calls them: imports wait until a worker runs them, so a driver starts at once."""

# ruff: noqa: PLC0415

from pathlib import Path
from typing import Any

from orchestrator.contents import DataFile
from orchestrator.data.prepare import Preparation
from orchestrator.schema import ExportStage, RandomBase, VocabularyStage
from orchestrator.stages.assignment import ExportAssignment, TrainAssignment, TrainEnding
from orchestrator.train.link import Link


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


def export_body(stage: ExportStage, assignment: ExportAssignment) -> dict[str, Any]:
    from orchestrator.stages.export import run_export

    return run_export(stage, assignment)


def prepare_body(preparation: Preparation, run_root: Path) -> tuple[Path, int]:
    """The folder of prepared data, and how many rows it has."""
    from orchestrator.data.prepare import prepare
    from orchestrator.data.rows import PreparedRows

    folder = prepare(preparation, run_root)
    return folder, len(PreparedRows.open(folder))
