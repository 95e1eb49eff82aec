"""PEFT's description of an adaptation: what makes its layers, and what lies beside the tensors that are written."""

from collections import Counter
from pathlib import Path
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_WEIGHTS
from peft.utils.constants import DUMMY_TARGET_MODULES

from orchestrator.model.adapters.adapterhub import WEIGHTS_NAME as ADAPTERHUB_WEIGHTS
from orchestrator.model.adapters.adapterhub import write_bottleneck_config
from orchestrator.model.adapters.prompting import prompt_config
from orchestrator.model.loading import load_config
from orchestrator.plan.adaptation import Adaptation


def peft_config(adaptation: Adaptation, base: Path | None = None, new_rows: range | None = None) -> PeftConfig:
    """Of an adapter that is trained or, with `base`, of one that is written for that.

    `new_rows` are those of the tokens that were added, where the adapter holds any.
    """
    if adaptation.prompt:
        assert base
        return prompt_config(adaptation.prompt, load_config(base), str(base))
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base) if base else None,
        "modules_to_save": list(adaptation.modules_to_save) or None,
        "inference_mode": base is not None,
    }
    if adaptation.ia3:
        return IA3Config(target_modules=list(adaptation.ia3), feedforward_modules=list(adaptation.ia3_feedforward), **common)
    rows = {name: list(new_rows) for name in adaptation.rows_to_save} if new_rows else None
    return LoraConfig(trainable_token_indices=rows, **_factors(adaptation, is_written=base is not None), **common)


def write_config(adaptation: Adaptation, folder: Path, base: Path, new_rows: range | None) -> None:
    """The description that lies beside the tensors of an adapter."""
    if adaptation.bottleneck:
        write_bottleneck_config(adaptation.bottleneck, folder, base)
    else:
        peft_config(adaptation, base, new_rows).save_pretrained(str(folder))


def weights_name(adaptation: Adaptation) -> str:
    """Of the file that holds the tensors."""
    return ADAPTERHUB_WEIGHTS if adaptation.bottleneck else PEFT_WEIGHTS


def weights_of(folder: Path) -> Path:
    """The file with the tensors of a written adapter."""
    adapterhub = folder / ADAPTERHUB_WEIGHTS
    return adapterhub if adapterhub.is_file() else folder / PEFT_WEIGHTS


def _factors(adaptation: Adaptation, is_written: bool) -> dict[str, Any]:
    """Ranks other than the most common one go into patterns."""
    shapes = adaptation.written_lora if is_written else adaptation.lora
    counted = Counter(shapes.values())
    common = counted.most_common(1)[0][0] if counted else None
    return {
        # PEFT refuses an empty list of targets; this name of its own stands for none.
        "target_modules": list(shapes) or DUMMY_TARGET_MODULES,
        "r": common.rank if common else 1,
        "lora_alpha": common.alpha if common else 1,
        "lora_dropout": adaptation.dropout,
        "rank_pattern": {name: shape.rank for name, shape in shapes.items() if shape != common},
        "alpha_pattern": {name: shape.alpha for name, shape in shapes.items() if shape != common},
        "bias": adaptation.bias,
        "use_rslora": adaptation.rslora,
        "use_dora": adaptation.dora,
        "init_lora_weights": "gaussian" if adaptation.init == "gaussian" and not is_written else True,
    }
