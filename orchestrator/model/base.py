"""Writes a base model anew with larger embeddings, shard by shard, so that one shard is all it holds in memory."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrator.contents import weight_files
from orchestrator.errors import ModelError
from orchestrator.model.loading import load_config
from orchestrator.store import read_json, write_json

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_INDEX = "model.safetensors.index.json"
_IN_A_BLOCK = re.compile(r"\.\d+\.")


def resize_base(
    source: Path,
    target: Path,
    *,
    base_tokens: int,
    grow: Callable[[str, Tensor], Tensor],
    pad_token_id: int | None,
) -> int:
    """Writes the model of `source` to `target` with embedding and head grown by `grow(name, matrix)`; gives their rows.

    All other tensors and the shards' names stay. A tied head is written out, as a copy of the grown embedding.
    Raises ModelError for another layout, and for a base with fewer rows than its tokenizer's `base_tokens`.
    """
    # PEFT merges adapters on tied weights wrongly: measured with 0.21, logits of at most 0.9 came out 0.3 to 0.6 off.
    tied = load_config(source).tie_word_embeddings
    shards = _shards(source)
    _check(source, shards, tied, base_tokens)
    target.mkdir(parents=True, exist_ok=True)
    rows, weight_map, numbers, size = 0, {}, 0, 0
    for shard in shards:
        tensors = _grown(load_file(source / shard), tied, grow)
        rows = len(tensors[EMBEDDING]) if EMBEDDING in tensors else rows
        save_file(tensors, target / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        numbers += sum(tensor.numel() for tensor in tensors.values())
        size += sum(tensor.nbytes for tensor in tensors.values())
    if (source / _INDEX).is_file():
        metadata = {"total_parameters": numbers, "total_size": size}
        write_json(target / _INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    _write_config(source, target, rows, pad_token_id)
    return rows


def _shards(source: Path) -> dict[str, list[str]]:
    """The names of the tensors in each file of weights that the model is made of."""
    shards = {}
    for file in weight_files(source):
        with safe_open(source / file, framework="pt") as tensors:
            shards[file] = list(tensors.keys())
    return shards


def _check(source: Path, shards: dict[str, list[str]], tied: bool, base_tokens: int) -> None:
    shard_of = {name: shard for shard, names in shards.items() for name in names}
    for name in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        if name not in shard_of:
            outside = sorted(found for found in shard_of if not _IN_A_BLOCK.search(found))
            raise ModelError(
                f"{source} has no tensor {name}; outside its blocks it has {', '.join(outside) or 'none'}; "
                "give a LLaMA-family decoder (llama, mistral, qwen2, qwen3)"
            )
    with safe_open(source / shard_of[EMBEDDING], framework="pt") as tensors:
        rows = tensors.get_slice(EMBEDDING).get_shape()[0]
    if rows < base_tokens:
        raise ModelError(
            f"{source}: base has {rows:,} rows but its tokenizer {base_tokens:,} tokens; "
            "put the tokenizer it was trained with beside the weights"
        )


def _grown(tensors: dict[str, Tensor], tied: bool, grow: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    if tied:
        tensors.pop(HEAD, None)
    for name in tensors.keys() & {EMBEDDING, HEAD}:
        tensors[name] = grow(name, tensors[name])
    if tied and EMBEDDING in tensors:
        tensors[HEAD] = tensors[EMBEDDING].clone()
    return tensors


def _write_config(source: Path, target: Path, rows: int, pad_token_id: int | None) -> None:
    config = read_json(source / "config.json") | {"vocab_size": rows, "tie_word_embeddings": False}
    if pad_token_id is not None:
        config["pad_token_id"] = pad_token_id
    write_json(target / "config.json", config)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", target / "generation_config.json")
