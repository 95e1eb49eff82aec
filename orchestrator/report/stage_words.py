"""A stage in words: what learns in it, and what it leaves."""

from collections.abc import Sequence
from pathlib import Path

from orchestrator.plan.plan import PlannedStage
from orchestrator.schema import (
    BitFit,
    Bottleneck,
    EvaluationStage,
    ExportStage,
    FullFineTuning,
    Ia3,
    Lora,
    MergeStage,
    Method,
    PrefixTuning,
    PromptTuning,
    PTuning,
    Subspace,
    TrainStage,
    VocabularyStage,
)
from orchestrator.schema.methods import ALL_LINEAR


def what_learns(planned: PlannedStage) -> str:
    """A clause that says what a stage trains or makes."""
    stage = planned.stage
    match stage:
        case VocabularyStage(merge="none"):
            return "nothing: keeps the base tokenizer"
        case VocabularyStage():
            return f"nothing: merges a vocabulary ({stage.merge})"
        case MergeStage():
            return "nothing: makes what was learned part of the base"
        case EvaluationStage():
            return "nothing: measures " + ("each model so far" if stage.models == "all" else "the last model")
        case ExportStage():
            return "nothing: writes one adapter" + (" and the merged model" if stage.merged else "")
        case TrainStage():
            rows = f"new rows of {', '.join(stage.new_rows)}" if stage.new_rows else ""
            parts = (_method_in_words(stage.method), ", ".join(stage.modules_to_save), rows)
            on = f", on a base in {stage.quantization.kind}" if stage.quantization else ""
            return " + ".join(part for part in parts if part) + on


def _method_in_words(method: Method | None) -> str:
    match method:
        case Lora():
            kind = " ".join(
                word
                for word, used in (
                    ("rsLoRA", method.rslora),
                    ("DoRA", method.dora),
                    ("PiSSA", method.init == "pissa"),
                    ("LoftQ", method.init == "loftq"),
                )
                if used
            )
            return f"{kind or 'LoRA'} r{method.rank} on {_layers_in_words(method.targets)}"
        case FullFineTuning():
            return "every weight"
        case Subspace():
            return f"every weight, in a subspace of {method.dimension:,} dimensions"
        case BitFit():
            return "biases"
        case Ia3():
            return f"IA3 on {_layers_in_words(method.targets)}"
        case Bottleneck():
            return (
                f"networks {method.size} wide behind {'attention and MLP' if method.placement == 'houlsby' else 'the MLP'}"
            )
        case PromptTuning() | PTuning() | PrefixTuning():
            return f"{method.virtual_tokens} virtual tokens ({method.kind.replace('_', ' ')})"
        case None:
            return ""


def _layers_in_words(targets: Sequence[str] | str) -> str:
    if isinstance(targets, str):
        return "all linear layers" if targets == ALL_LINEAR else targets
    return ", ".join(name.removesuffix("_proj") for name in targets)


def artifacts(planned: PlannedStage) -> list[Path]:
    """What a finished stage left for others to use."""
    match planned.stage:
        case VocabularyStage():
            names = ["tokenizer", "base"]
        case TrainStage():
            names = ["adapter", "model"]
        case MergeStage():
            names = ["model"]
        case ExportStage():
            names = ["adapter", "merged"]
        case EvaluationStage():
            return [planned.folder / name for name in ("table.md",) if (planned.folder / name).is_file()]
    return [planned.folder / name for name in names if (planned.folder / name).is_dir()]
