"""A model's weights in several files, as transformers names and lists them."""

import json
from collections.abc import Mapping
from pathlib import Path

_INDEX_NAME = "model.safetensors.index.json"


def assign_shards(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """The names of the tensors in each file, in their order; `sizes` are in bytes."""
    groups: list[list[str]] = [[]]
    held = 0
    for key, size in sizes.items():
        if groups[-1] and held + size > max_bytes:
            groups.append([])
            held = 0
        groups[-1].append(key)
        held += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": keys for number, keys in enumerate(groups, start=1)}


def write_index(folder: Path, shards: Mapping[str, list[str]], sizes: Mapping[str, int]) -> None:
    """Which file each tensor is in; one file needs none."""
    if len(shards) == 1:
        return
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {key: name for name, keys in shards.items() for key in keys},
    }
    (folder / _INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
