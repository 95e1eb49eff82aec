"""What a recipe may say: frozen, typed, unknown keys forbidden. Values only; nothing here reads a file."""

from orchestrator.schema.execution import (
    AddressCluster,
    CheckpointPolicy,
    Cluster,
    LocalCluster,
    NoTracking,
    Recovery,
    Tracking,
    WandbTracking,
    WorkerRange,
    Workers,
)
from orchestrator.schema.recipe import RandomBase, Recipe, Retention, StageSelection
from orchestrator.schema.stages import ExportStage, Lora, Resources, Stage, TrainStage, VocabularyStage
from orchestrator.schema.strict import Schema

__all__ = [
    "AddressCluster",
    "CheckpointPolicy",
    "Cluster",
    "ExportStage",
    "LocalCluster",
    "Lora",
    "NoTracking",
    "RandomBase",
    "Recipe",
    "Recovery",
    "Resources",
    "Retention",
    "Schema",
    "Stage",
    "StageSelection",
    "Tracking",
    "TrainStage",
    "VocabularyStage",
    "WandbTracking",
    "WorkerRange",
    "Workers",
]
