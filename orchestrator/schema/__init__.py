"""What a recipe may say: frozen, typed, unknown keys forbidden. Values only; nothing here reads a file."""

from orchestrator.schema.cluster import (
    AddressCluster,
    Cluster,
    KubernetesCluster,
    LocalCluster,
    PlacedCluster,
    Range,
)
from orchestrator.schema.execution import (
    CheckpointPolicy,
    NoTracking,
    Recovery,
    Tracking,
    WandbTracking,
    Workers,
)
from orchestrator.schema.methods import (
    BitFit,
    FullFineTuning,
    Ia3,
    Lora,
    Method,
    PrefixTuning,
    PromptMethod,
    PromptTuning,
    PTuning,
    Quantization,
)
from orchestrator.schema.recipe import Comparison, HeldOutShare, RandomBase, Reading, Recipe, Retention, StageSelection
from orchestrator.schema.stages import ExportStage, MergeStage, Resources, Stage, TrainStage, VocabularyStage
from orchestrator.schema.strict import Schema, WeightedSource, WeightedSources

__all__ = [
    "AddressCluster",
    "BitFit",
    "CheckpointPolicy",
    "Cluster",
    "Comparison",
    "ExportStage",
    "FullFineTuning",
    "HeldOutShare",
    "Ia3",
    "KubernetesCluster",
    "LocalCluster",
    "Lora",
    "MergeStage",
    "Method",
    "NoTracking",
    "PTuning",
    "PlacedCluster",
    "PrefixTuning",
    "PromptMethod",
    "PromptTuning",
    "Quantization",
    "RandomBase",
    "Range",
    "Reading",
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
    "WeightedSource",
    "WeightedSources",
    "Workers",
]
