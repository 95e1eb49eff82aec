"""A model of which every weight was trained, on disk: a folder that transformers loads, shard by shard."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from orchestrator.checkpoint.adapter import verify_written
from orchestrator.checkpoint.manifest import Origin, shapes_of, write_manifest
from orchestrator.contents import copy_tokenizer
from orchestrator.model.shards import assign_shards, write_index
from orchestrator.store import sync_files, sync_folder

_SHARD_BYTES = 5_000_000_000


def write_whole_model(
    folder: Path,
    layout: Mapping[str, Tensor],
    parameters: Iterable[tuple[str, Tensor]],
    origin: Origin,
    beside: tuple[Path, Path],
) -> None:
    """Writes parameters as they come, in the order of `layout`, which has their shapes and dtypes on the meta device.

    `beside` are the base and the tokenizer whose configuration is the model's own. The folder stands whole or not at all;
    TrainingError when what was written is not what was learned.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    for leftover in (temporary, folder):
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    sizes = {name: tensor.nbytes for name, tensor in layout.items()}
    shards = assign_shards(sizes, _SHARD_BYTES)
    coming = iter(parameters)
    for file, names in shards.items():
        tensors = dict(next(coming) for _ in names)
        save_file(tensors, temporary / file, metadata={"format": "pt"})
        verify_written(temporary / file, tensors)
    write_index(temporary, shards, sizes)
    copy_beside_weights(*beside, temporary)
    write_manifest(temporary, origin, shapes_of(layout))
    sync_files(temporary)
    temporary.rename(folder)
    sync_folder(folder.parent)


def copy_beside_weights(base: Path, tokenizer: Path, folder: Path) -> None:
    """What a model's folder holds beside its weights."""
    for name in ("config.json", "generation_config.json"):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    copy_tokenizer(tokenizer, folder)
