"""What differs from the base model: LoRA factors made by PEFT, and embedding and head trained in place.

PEFT is spoken in this file only. Embedding and head are trained where they are, without PEFT's second copy of both;
the folder that is written is PEFT's all the same.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from orchestrator.errors import ModelError, RecipeError
from orchestrator.model.tables import NEW_ROWS, OLD_ROWS, split_table
from orchestrator.plan.adaptation import Adaptation

_ADAPTER = "default"
_KEY_PREFIX = "base_model.model."
ROWS_NAME = "token_adapter.trainable_tokens_delta"
"""How PEFT calls the rows of some tokens; it holds their values, not differences."""


def attach(model: nn.Module, adaptation: Adaptation, seed: int, base_tokens: int | None = None) -> None:
    """Adds the LoRA factors (B zero, A random by `seed`) and leaves exactly what the stage trains requiring gradients.

    Where it trains the new rows of a table, that is split behind the first `base_tokens`. Raises RecipeError for a target or
    module that the model has not.
    """
    check_targets(adaptation, linear_layer_names(model))
    if adaptation.lora:
        torch.manual_seed(seed)
        # Without modules_to_save: PEFT would wrap embedding and head, and train a second copy of each.
        inject_adapter_in_model(lora_config(replace(adaptation, modules_to_save=())), model, adapter_name=_ADAPTER)
        _silence_frozen_dropout(model, adaptation)
    for name in _modules(model, adaptation.trained_rows):
        assert base_tokens, "a table whose new rows are trained has new rows"
        split_table(model, name, base_tokens)
    trained = set(trained_parameters(model, adaptation))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters and all parameters, in elements."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)


def lora_config(adaptation: Adaptation, base: Path | None = None, new_rows: range | None = None) -> LoraConfig:
    """PEFT's description of an adaptation; ranks other than the most common one go into patterns.

    `new_rows` are those of the tokens that were added, where the adapter holds any.
    """
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
        trainable_token_indices={name: list(new_rows) for name in adaptation.rows_to_save} if new_rows else None,
        inference_mode=base is not None,
    )


def trained_parameters(model: nn.Module, adaptation: Adaptation) -> list[str]:
    """Names of the parameters that the stage trains, in the model's order."""
    names = _parameters(model, adaptation.trained_lora, (*adaptation.trained_modules, *adaptation.trained_rows))
    return [name for name in names if not name.endswith(f".{OLD_ROWS}")]


def adapter_parameters(model: nn.Module, adaptation: Adaptation) -> list[str]:
    """Names of the parameters that an adapter is made from."""
    return _parameters(model, tuple(adaptation.lora), (*adaptation.modules_to_save, *adaptation.rows_to_save))


def adapter_tensors(
    parameters: Mapping[str, Tensor], adaptation: Adaptation, base_tokens: int | None = None
) -> dict[str, Tensor]:
    """The adapter by PEFT key, from what `adapter_parameters` named: whole tables, and of `rows_to_save` the new rows."""
    found = {}
    for name, tensor in parameters.items():
        module, last = name.rsplit(".", 1)
        holds_rows = module.rsplit(".", 1)[-1] in adaptation.rows_to_save
        if last == NEW_ROWS and not holds_rows:
            found[adapter_key(f"{module}.weight")] = torch.cat([parameters[f"{module}.{OLD_ROWS}"], tensor])
        elif last == NEW_ROWS:
            found[rows_key(module)] = tensor
        elif last != OLD_ROWS:
            key = rows_key(module) if holds_rows else adapter_key(name)
            found[key] = tensor[base_tokens:].clone() if holds_rows else tensor
    return found


def adapter_key(parameter: str) -> str:
    return _KEY_PREFIX + parameter.replace(f".{_ADAPTER}.", ".")


def rows_key(module: str) -> str:
    """Of a table's new rows."""
    return f"{_KEY_PREFIX}{module}.{ROWS_NAME}"


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies an adapter's tensors, by PEFT key, into the model; ModelError names a key or shape that does not fit."""
    places = _places(model)
    for key, tensor in tensors.items():
        is_rows = key.endswith(f".{ROWS_NAME}")
        place = places.get(key.replace(ROWS_NAME, "weight"))
        if place is None:
            raise ModelError(f"the adapter holds {key}, which this stage's model has not")
        shape = (sum(len(part) for part in place), *place[0].shape[1:])
        # New rows are the table's last.
        first = shape[0] - len(tensor)
        if tensor.shape[1:] != shape[1:] or not (0 < first < shape[0] if is_rows else first == 0):
            raise ModelError(f"the adapter's {key} is {tuple(tensor.shape)}, the model's {shape}")
        begin = 0
        for part in place:
            end, start = begin + len(part), max(begin, first)
            if start < end:
                part[start - begin :].copy_(tensor[start - first : end - first])
            begin = end


def _places(model: nn.Module) -> dict[str, list[Tensor]]:
    """The parameters that each key of an adapter may be copied to: one, or both parts of a split table."""
    places: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        module, last = name.rsplit(".", 1)
        key = adapter_key(f"{module}.weight" if last in (OLD_ROWS, NEW_ROWS) else name)
        places.setdefault(key, []).append(parameter)
    return places


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
        return parts[-1] in ("weight", OLD_ROWS, NEW_ROWS) and parts[-2] in modules

    return [name for name, _ in model.named_parameters() if belongs(name)]


def _modules(model: nn.Module, last_names: tuple[str, ...]) -> list[str]:
    return [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in last_names]


def _silence_frozen_dropout(model: nn.Module, adaptation: Adaptation) -> None:
    """PEFT has one dropout for all; an earlier stage's frozen factors should not be disturbed by it."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and name.rsplit(".", 1)[-1] not in adaptation.trained_lora:
            module.lora_dropout[_ADAPTER] = nn.Identity()
