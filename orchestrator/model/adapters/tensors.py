"""An adapter's tensors by PEFT key: from a model's parameters, and back into a model."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from orchestrator.errors import ModelError
from orchestrator.model.adapters.names import KEY_PREFIX, ROWS_NAME, adapter_key, plain_key, rows_key
from orchestrator.model.adapters.prompting import prompt_tensors
from orchestrator.model.adapters.singular import beginnings, difference
from orchestrator.model.tables import NEW_ROWS, OLD_ROWS
from orchestrator.plan.adaptation import Adaptation

Beginnings = Mapping[str, tuple[Tensor, Tensor]]


def adapter_tensors(
    parameters: Mapping[str, Tensor],
    adaptation: Adaptation,
    base_tokens: int | None = None,
    beginnings: Beginnings | None = None,
) -> dict[str, Tensor]:
    """The adapter by PEFT key, from what `adapter_parameters` named: whole tables, and of `rows_to_save` the new rows.

    `beginnings` are the factors that were taken out of a weight, by layer.
    """
    found = {}
    for name, tensor in parameters.items():
        module, last = name.rsplit(".", 1)
        holds_rows = module.rsplit(".", 1)[-1] in adaptation.rows_to_save
        if last == NEW_ROWS and not holds_rows:
            found[adapter_key(f"{module}.weight")] = torch.cat([parameters[f"{module}.{OLD_ROWS}"], tensor])
        elif last == NEW_ROWS:
            found[rows_key(module)] = tensor
        elif last != OLD_ROWS:
            key = rows_key(module) if holds_rows else _written_key(name)
            found[key] = tensor[base_tokens:].clone() if holds_rows else tensor
    for layer, began in (beginnings or {}).items():
        keys = [f"{adapter_key(layer)}.lora_{factor}.weight" for factor in "AB"]
        found |= dict(zip(keys, difference((found[keys[0]], found[keys[1]]), began, adaptation.rslora), strict=True))
    return found


def written_tensors(
    model: nn.Module, parameters: Mapping[str, Tensor], adaptation: Adaptation, base_tokens: int | None
) -> dict[str, Tensor]:
    """The adapter of a model by key, from its parameters that `adapter_parameters` named, whole."""
    if adaptation.bottleneck:
        return dict(parameters)
    if adaptation.prompt:
        return prompt_tensors(model, parameters)
    return adapter_tensors(parameters, adaptation, base_tokens, beginnings(model))


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies an adapter's tensors, by key, into the model; ModelError names a key or shape that does not fit."""
    places = _places(model)
    for key, tensor in tensors.items():
        is_rows = key.endswith(f".{ROWS_NAME}")
        # AdapterHub's keys are the model's own names.
        named = plain_key(key) if key.startswith(KEY_PREFIX) else KEY_PREFIX + key
        place = places.get(named.replace(ROWS_NAME, "weight"))
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


def _written_key(name: str) -> str:
    """As PEFT finds it: the bias of a wrapped layer lies inside."""
    key = adapter_key(name)
    return key.removesuffix(".bias") + ".base_layer.bias" if name.endswith(".base_layer.bias") else key
