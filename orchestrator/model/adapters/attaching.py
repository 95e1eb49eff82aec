"""What differs from the base model: layers made by PEFT, and embedding, head and biases trained in place.

Embedding and head are trained where they are, without PEFT's second copy of both; the folder that is written is PEFT's
all the same.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from orchestrator.errors import RecipeError
from orchestrator.model.adapters.adapterhub import WEIGHTS_NAME as ADAPTERHUB_WEIGHTS
from orchestrator.model.adapters.adapterhub import read_bottleneck
from orchestrator.model.adapters.config import peft_config
from orchestrator.model.adapters.names import ADAPTER, adapted_layer
from orchestrator.model.adapters.prompting import add_prompts
from orchestrator.model.adapters.singular import make_up, take_out
from orchestrator.model.adapters.tensors import load_tensors
from orchestrator.model.bottlenecks import add_bottlenecks, bottleneck_kind, is_bottleneck
from orchestrator.model.loading import weight_reader
from orchestrator.model.prompts import NAME as PROMPTS
from orchestrator.model.subspace import NAME as SUBSPACE
from orchestrator.model.subspace import SubspaceModule
from orchestrator.model.tables import NEW_ROWS, OLD_ROWS, split_table
from orchestrator.plan.adaptation import Adaptation, Bias
from orchestrator.plan.targets import ends_in


def attach(
    model: nn.Module, adaptation: Adaptation, seed: int, base_tokens: int | None = None, base: Path | None = None
) -> None:
    """Adds what the stage trains beside the base, at random by `seed`, and leaves exactly that requiring gradients.

    Where it trains the new rows of a table, that is split behind the first `base_tokens`. The model computes what it did
    before or, where `init` makes up for what quantization took, something nearer to the model in the folder `base`. Raises
    RecipeError for a target that the model has not.
    """
    _check_targets(model, adaptation)
    if adaptation.prompt:
        add_prompts(model, adaptation.prompt, seed)
    if adaptation.bottleneck:
        add_bottlenecks(model, adaptation.bottleneck, seed)
    if adaptation.subspace:
        model.add_module(SUBSPACE, SubspaceModule(model, adaptation.subspace, seed))
    if adaptation.lora or adaptation.ia3:
        torch.manual_seed(seed)
        # Without modules_to_save: PEFT would wrap embedding and head, and train a second copy of each.
        inject_adapter_in_model(peft_config(replace(adaptation, modules_to_save=())), model, adapter_name=ADAPTER)
        _silence_frozen_dropout(model, adaptation)
    if adaptation.init == "pissa":
        take_out(model, adaptation.trained_lora)
    if adaptation.init == "loftq":
        assert base, "what quantization took is seen from the weights on disk"
        make_up(model, adaptation.trained_lora, weight_reader(base))
    for name in _modules(model, adaptation.trained_rows):
        assert base_tokens, "a table whose new rows are trained has new rows"
        split_table(model, name, base_tokens)
    trained = set(trained_parameters(model, adaptation))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters and all parameters, in elements."""
    counts = [(_elements(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)


def count_by_kind(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The same by the last name of the module, such as q_proj, in the model's order."""
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        module = adapted_layer(name) or name.rsplit(".", 1)[0].removesuffix(".base_layer")
        kind = PROMPTS if name.startswith(f"{PROMPTS}.") else module.rsplit(".", 1)[-1]
        if is_bottleneck(name):
            kind = bottleneck_kind(name)
        trained, total = counts.get(kind, (0, 0))
        size = _elements(parameter)
        counts[kind] = trained + size * parameter.requires_grad, total + size
    return counts


def _elements(parameter: nn.Parameter) -> int:
    """Of a parameter; several weights of a few bits share a byte."""
    packed = getattr(parameter, "quant_state", None)
    return packed.shape.numel() if packed else parameter.numel()


def trained_parameters(model: nn.Module, adaptation: Adaptation) -> list[str]:
    """Names of the parameters that the stage trains, in the model's order."""
    if adaptation.subspace:
        return [name for name, _ in model.named_parameters() if name.startswith(f"{SUBSPACE}.")]
    if adaptation.full:
        return [name for name, _ in model.named_parameters()]
    if adaptation.prompt or adaptation.bottleneck:
        return adapter_parameters(model, adaptation)
    layers = adaptation.trained_lora + (adaptation.ia3 if adaptation.trains_ia3 else ())
    tables = (*adaptation.trained_modules, *adaptation.trained_rows)
    names = _parameters(model, layers, tables, adaptation.trained_bias)
    return [name for name in names if not name.endswith(f".{OLD_ROWS}")]


def adapter_parameters(model: nn.Module, adaptation: Adaptation) -> list[str]:
    """Names of the parameters that an adapter is made from."""
    if adaptation.prompt:
        return [name for name, _ in model.named_parameters() if name.startswith(f"{PROMPTS}.")]
    if adaptation.bottleneck:
        return [name for name, _ in model.named_parameters() if is_bottleneck(name)]
    layers = (*adaptation.lora, *adaptation.ia3)
    return _parameters(model, layers, (*adaptation.modules_to_save, *adaptation.rows_to_save), adaptation.bias)


def second_factors(model: nn.Module) -> list[str]:
    """Names of the parameters B, which LoRA+ lets learn faster."""
    return [name for name, _ in model.named_parameters() if {"lora_B", "lora_embedding_B"} & set(name.split("."))]


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """A model with a written adapter, as anyone's script loads it: by PEFT alone, which has all but bottlenecks."""
    if bottleneck := read_bottleneck(folder):
        attach(model, Adaptation(bottleneck=bottleneck), seed=0)
        load_tensors(model, load_file(folder / ADAPTERHUB_WEIGHTS))
        return model
    return PeftModel.from_pretrained(model, str(folder))


def _check_targets(model: nn.Module, adaptation: Adaptation) -> None:
    """RecipeError for a target that names no layer; such a target would silently train nothing."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    unknown = [
        target for target in (*adaptation.lora, *adaptation.ia3) if not any(ends_in(layer, target) for layer in layers)
    ]
    if unknown:
        names = sorted({layer.rsplit(".", 1)[-1] for layer in layers})
        raise RecipeError(f"targets: {', '.join(unknown)} names no layer of this model; choose from {', '.join(names)}")


def _parameters(model: nn.Module, layers: Sequence[str], tables: Sequence[str], bias: Bias) -> list[str]:
    def is_one(module: str, names: Sequence[str]) -> bool:
        return any(ends_in(module, name) for name in names)

    def belongs(name: str) -> bool:
        if layer := adapted_layer(name):
            return is_one(layer, layers)
        module, last = name.rsplit(".", 1)
        if last == "bias":
            return bias == "all" or (bias == "lora_only" and is_one(module.removesuffix(".base_layer"), layers))
        return last in ("weight", OLD_ROWS, NEW_ROWS) and is_one(module, tables)

    return [name for name, _ in model.named_parameters() if belongs(name)]


def _modules(model: nn.Module, last_names: tuple[str, ...]) -> list[str]:
    return [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in last_names]


def _silence_frozen_dropout(model: nn.Module, adaptation: Adaptation) -> None:
    """PEFT has one dropout for all; an earlier stage's frozen factors should not be disturbed by it."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and not any(ends_in(name, target) for target in adaptation.trained_lora):
            module.lora_dropout[ADAPTER] = nn.Identity()
