"""Base and adapter as one model, shard by shard: memory holds one shard, never the model."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from orchestrator.contents import weight_files
from orchestrator.errors import ModelError
from orchestrator.model.adapters import MergeRule
from orchestrator.model.adapters.names import plain_key
from orchestrator.model.shards import assign_shards, write_index


def write_merged(base: Path, adapter: Mapping[str, Tensor], rule: MergeRule, folder: Path, max_shard_bytes: int) -> None:
    """Writes each weight with what the adapter, by PEFT key, has for it, such as W + (alpha / rank) B A, and all the rest.

    The sum is made in fp32 and stored in the base's dtype. ModelError names an adapter tensor that found no place.
    """
    sizes = _sizes(base)
    shards = assign_shards(sizes, max_shard_bytes)
    adapter = {plain_key(key): tensor for key, tensor in adapter.items()}
    unused = set(adapter)
    for name, keys in shards.items():
        tensors = {key: rule.merged(key, tensor, adapter, unused) for key, tensor in _read(base, keys)}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if unused:
        raise ModelError(f"the adapter's {sorted(unused)[0]} has no counterpart in the base {base}")
    write_index(folder, shards, sizes)


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
