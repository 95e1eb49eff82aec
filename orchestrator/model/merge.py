"""Base and adapter as one model, shard by shard: memory holds one shard, never the model."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from orchestrator.contents import weight_files
from orchestrator.errors import ModelError
from orchestrator.model.adapters import ROWS_NAME
from orchestrator.plan.adaptation import Adaptation

_PREFIX = "base_model.model."
_INDEX_NAME = "model.safetensors.index.json"


def write_merged(
    base: Path, adapter: Mapping[str, Tensor], adaptation: Adaptation, folder: Path, max_shard_bytes: int
) -> None:
    """Writes W + (alpha / rank) B A for each adapted layer, and the adapter's embedding and head, beside all the rest.

    The sum is made in fp32 and stored in the base's dtype. ModelError names an adapter tensor that found no place.
    """
    sizes = _sizes(base)
    shards = _assign_shards(sizes, max_shard_bytes)
    unused = set(adapter)
    for name, keys in shards.items():
        tensors = {key: _merged(key, tensor, adapter, adaptation, unused) for key, tensor in _read(base, keys)}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if unused:
        raise ModelError(f"the adapter's {sorted(unused)[0]} has no counterpart in the base {base}")
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {key: name for name, keys in shards.items() for key in keys},
        }
        (folder / _INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")


def _merged(key: str, tensor: Tensor, adapter: Mapping[str, Tensor], adaptation: Adaptation, unused: set[str]) -> Tensor:
    whole = _PREFIX + key
    if whole in adapter:
        unused.discard(whole)
        return adapter[whole].to(tensor.dtype)
    stem = _PREFIX + key.removesuffix(".weight")
    if (rows := f"{stem}.{ROWS_NAME}") in adapter:
        unused.discard(rows)
        new = adapter[rows].to(tensor.dtype)
        return torch.cat([tensor[: len(tensor) - len(new)], new])
    first, second = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
    if first not in adapter:
        return tensor
    unused.difference_update((first, second))
    shape = adaptation.lora[stem.rsplit(".", 1)[-1]]
    update = (adapter[second].float() @ adapter[first].float()) * (shape.alpha / shape.rank)
    return (tensor.float() + update).to(tensor.dtype)


def _assign_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    held = 0
    for key, size in sizes.items():
        if groups[-1] and held + size > max_shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(key)
        held += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": keys for number, keys in enumerate(groups, start=1)}


def _sizes(base: Path) -> dict[str, int]:
    """Bytes of each tensor, in the order of the base's files."""
    sizes = {}
    for name in weight_files(base):
        with safe_open(base / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  a safetensors file is no dict
                part = file.get_slice(key)
                elements = torch.Size(part.get_shape()).numel()
                sizes[key] = elements * torch.empty((), dtype=_DTYPES[part.get_dtype()]).element_size()
    return sizes


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _read(base: Path, keys: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name in weight_files(base):
        with safe_open(base / name, framework="pt") as file:
            present = set(file.keys())
            for key in keys:
                if key in present:
                    yield key, file.get_tensor(key)
