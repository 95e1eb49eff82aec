"""Which adapters there are, and what each says of itself."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from orchestrator.checkpoint.manifest import MANIFEST_NAME, Manifest, check_belongs, check_files, read_manifest
from orchestrator.errors import ModelError
from orchestrator.model.adapters import weights_of
from orchestrator.model.adapters.adapterhub import read_bottleneck
from orchestrator.model.bottlenecks import bottleneck_kind, is_bottleneck
from orchestrator.store import read_json

CONFIG_NAME = "adapter_config.json"


@dataclass(frozen=True)
class Described:
    """An adapter, without its tensors."""

    folder: Path
    manifest: Manifest
    config: dict[str, Any]
    """As PEFT wrote it, or we for AdapterHub."""

    @property
    def parameters(self) -> int:
        return sum(torch.Size(tensor["shape"]).numel() for tensor in self.manifest.tensors.values())

    @property
    def bytes(self) -> int:
        return weights_of(self.folder).stat().st_size

    @property
    def is_peft(self) -> bool:
        """Whether PEFT loads it."""
        return "peft_type" in self.config

    @property
    def method(self) -> str:
        """Such as `LORA r8 on q_proj, v_proj`."""
        config = self.config
        if bottleneck := read_bottleneck(self.folder):
            where = "attention and MLP" if bottleneck.placement == "houlsby" else "MLP"
            return f"BOTTLENECK {bottleneck.size} wide behind {where}"
        targets = config.get("target_modules") or ()
        named = targets if isinstance(targets, str) else ", ".join(sorted({name.rsplit(".", 1)[-1] for name in targets}))
        rank = f" r{config['r']}" if "r" in config and named else ""
        virtual = f", {config['num_virtual_tokens']} virtual tokens" if config.get("num_virtual_tokens") else ""
        saved = f" + {', '.join(config['modules_to_save'])}" if config.get("modules_to_save") else ""
        rows = (
            f" + new rows of {', '.join(config['trainable_token_indices'])}" if config.get("trainable_token_indices") else ""
        )
        return f"{config['peft_type']}{rank}{f' on {named}' if named else ''}{virtual}{saved}{rows}"

    @property
    def kinds(self) -> dict[str, tuple[int, int]]:
        """Tensors and their parameters by the kind of module that they are for."""
        tensors: Counter[str] = Counter()
        parameters: Counter[str] = Counter()
        for key, tensor in self.manifest.tensors.items():
            kind = _module_kind(key)
            tensors[kind] += 1
            parameters[kind] += torch.Size(tensor["shape"]).numel()
        return {kind: (count, parameters[kind]) for kind, count in tensors.items()}


def find_adapters(root: Path) -> Iterator[Described]:
    """Those below a folder, by name, that this project wrote."""
    for file in sorted(root.rglob(MANIFEST_NAME)):
        if (file.parent / CONFIG_NAME).is_file():
            yield describe(file.parent)


def describe(folder: Path) -> Described:
    """ModelError for a folder that is no adapter which this project wrote."""
    if not (folder / CONFIG_NAME).is_file():
        raise ModelError(f"{folder} has no {CONFIG_NAME}; give the folder of an adapter, such as runs/attention-…/adapter")
    return Described(folder, read_manifest(folder), read_json(folder / CONFIG_NAME))


def verify(folder: Path, base: Path | None = None, tokenizer: Path | None = None) -> Described:
    """The adapter, once each file is what was written and each tensor finite and not all zero; with a base, its own.

    ModelError names the first thing that is not so.
    """
    described = describe(folder)
    check_files(folder, described.manifest)
    if base:
        check_belongs(folder, described.manifest, base, tokenizer or folder)
    with safe_open(weights_of(folder), framework="pt") as file:
        keys = set(file.keys())
        if keys != described.manifest.tensors.keys():
            raise ModelError(f"{folder}: {sorted(keys ^ described.manifest.tensors.keys())[0]} is too many or too few")
        for key in sorted(keys):
            tensor = file.get_tensor(key)
            if not tensor.isfinite().all() or not tensor.any():
                raise ModelError(f"{folder}: {key} is {'all zero' if tensor.isfinite().all() else 'not finite'}")
    return described


def _module_kind(key: str) -> str:
    """`q_proj` of base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight."""
    if is_bottleneck(key):
        return bottleneck_kind(key)
    parts = [part for part in key.split(".") if part not in ("base_model", "model", "weight", "bias", "base_layer")]
    return next(
        (part for part in reversed(parts) if not part.startswith(("lora_", "ia3_", "token_adapter", "trainable_"))), key
    )
