"""What differs from the base model: LoRA factors made by PEFT, and embedding and head trained in place.

PEFT is spoken in this file only. Embedding and head are trained where they are, without PEFT's second copy of both;
the folder that is written is PEFT's all the same.
"""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from orchestrator.errors import ModelError, RecipeError
from orchestrator.plan.adaptation import Adaptation

_ADAPTER = "default"
_KEY_PREFIX = "base_model.model."


def attach(model: nn.Module, adaptation: Adaptation, seed: int) -> None:
    """Adds the LoRA factors (B zero, A random by `seed`) and leaves exactly what the stage trains requiring gradients.

    Raises RecipeError for a target or module that the model has not.
    """
    check_targets(adaptation, linear_layer_names(model))
    if adaptation.lora:
        torch.manual_seed(seed)
        # Without modules_to_save: PEFT would wrap embedding and head, and train a second copy of each.
        inject_adapter_in_model(lora_config(replace(adaptation, modules_to_save=())), model, adapter_name=_ADAPTER)
        _silence_frozen_dropout(model, adaptation)
    trained = set(trained_parameters(model, adaptation))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters and all parameters, in elements."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)


def lora_config(adaptation: Adaptation, base: Path | None = None) -> LoraConfig:
    """PEFT's description of an adaptation; ranks other than the most common one go into patterns."""
    shapes = Counter(adaptation.lora.values())
    common = shapes.most_common(1)[0][0] if shapes else None
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base) if base else None,
        # PEFT refuses an empty list of targets; this name of its own stands for none.
        target_modules=list(adaptation.lora) if adaptation.lora else DUMMY_TARGET_MODULES,
        r=common.rank if common else 1,
        lora_alpha=common.alpha if common else 1,
        lora_dropout=adaptation.dropout,
        rank_pattern={name: shape.rank for name, shape in adaptation.lora.items() if shape != common},
        alpha_pattern={name: shape.alpha for name, shape in adaptation.lora.items() if shape != common},
        modules_to_save=list(adaptation.modules_to_save) or None,
        inference_mode=base is not None,
    )


def trained_parameters(model: nn.Module, adaptation: Adaptation) -> list[str]:
    """Names of the parameters that the stage trains, in the model's order."""
    return _parameters(model, adaptation.trained_lora, adaptation.trained_modules)


def adapter_parameters(model: nn.Module, adaptation: Adaptation) -> dict[str, str]:
    """The key in PEFT's file for the name of each parameter that differs from the base."""
    names = _parameters(model, tuple(adaptation.lora), adaptation.modules_to_save)
    return {name: adapter_key(name) for name in names}


def adapter_key(parameter: str) -> str:
    return _KEY_PREFIX + parameter.replace(f".{_ADAPTER}.", ".")


def load_tensors(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copies an adapter's tensors, by PEFT key, into the model; ModelError names a key or shape that does not fit."""
    parameters = {adapter_key(name): parameter for name, parameter in model.named_parameters()}
    for key, tensor in tensors.items():
        if key not in parameters:
            raise ModelError(f"the adapter holds {key}, which this stage's model has not")
        if parameters[key].shape != tensor.shape:
            raise ModelError(f"the adapter's {key} is {tuple(tensor.shape)}, the model's {tuple(parameters[key].shape)}")
        with torch.no_grad():
            parameters[key].copy_(tensor)


def load_with_peft(model: nn.Module, folder: Path) -> nn.Module:
    """The adapter as anyone's script loads it: by PEFT alone."""
    return PeftModel.from_pretrained(model, str(folder))


def linear_layer_names(model: nn.Module) -> tuple[str, ...]:
    """Last names of the linear layers inside the blocks, sorted."""
    linear = (
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name)
    )
    return tuple(sorted({name.rsplit(".", 1)[-1] for name in linear}))


def check_targets(adaptation: Adaptation, linear_layers: tuple[str, ...]) -> None:
    """RecipeError for a LoRA target that names no linear layer; such a target would silently train nothing."""
    unknown = [target for target in adaptation.lora if target not in linear_layers]
    if unknown:
        raise RecipeError(
            f"lora.targets: {', '.join(unknown)} names no linear layer of this model; choose from {', '.join(linear_layers)}"
        )


def _parameters(model: nn.Module, targets: tuple[str, ...], modules: tuple[str, ...]) -> list[str]:
    def belongs(name: str) -> bool:
        parts = name.split(".")
        if "lora_A" in parts or "lora_B" in parts:
            return parts[-4] in targets
        return parts[-1] == "weight" and parts[-2] in modules

    return [name for name, _ in model.named_parameters() if belongs(name)]


def _silence_frozen_dropout(model: nn.Module, adaptation: Adaptation) -> None:
    """PEFT has one dropout for all; an earlier stage's frozen factors should not be disturbed by it."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and name.rsplit(".", 1)[-1] not in adaptation.trained_lora:
            module.lora_dropout[_ADAPTER] = nn.Identity()
