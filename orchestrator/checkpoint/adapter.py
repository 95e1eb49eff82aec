"""Adapters on disk, in PEFT's format or, for what PEFT has not, AdapterHub's: exactly what differs from the base, verified
once it is written.

PEFT's own saving writes nothing, or the frozen base as well, in several of our cases; so the tensors are named by us.
"""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from orchestrator.checkpoint.manifest import Origin, check_belongs, check_files, read_manifest, shapes_of, write_manifest
from orchestrator.contents import copy_tokenizer
from orchestrator.errors import ModelError, TrainingError
from orchestrator.model.adapters import ROWS_NAME, weights_name, weights_of, write_config
from orchestrator.model.loading import load_config
from orchestrator.plan.adaptation import Adaptation
from orchestrator.store import sync_files, sync_folder


def write_adapter(
    folder: Path, tensors: dict[str, torch.Tensor], adaptation: Adaptation, origin: Origin, base: Path, tokenizer: Path
) -> None:
    """Writes `tensors`, by key, as an adapter folder that stands whole or not at all.

    Raises TrainingError when what was written is not what was learned.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    for leftover in (temporary, folder):
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    weights = temporary / weights_name(adaptation)
    save_file(tensors, weights, metadata={"format": "pt"})
    write_config(adaptation, temporary, base, _new_rows(tensors, base))
    copy_tokenizer(tokenizer, temporary)
    verify_written(weights, tensors)
    write_manifest(temporary, origin, shapes_of(tensors))
    sync_files(temporary)
    temporary.rename(folder)
    sync_folder(folder.parent)


def _new_rows(tensors: dict[str, torch.Tensor], base: Path) -> range | None:
    """Which rows of the base's tables an adapter holds without the rest: the last ones."""
    counts = {len(tensor) for key, tensor in tensors.items() if key.endswith(f".{ROWS_NAME}")}
    if not counts:
        return None
    (count,), rows = counts, load_config(base).vocab_size
    return range(rows - count, rows)


def verify_written(path: Path, expected: dict[str, torch.Tensor]) -> None:
    """Reads a file back: the same names, shapes and values, and no tensor that is all zero or not finite."""
    with safe_open(path, framework="pt") as file:
        written = set(file.keys())
    if written != set(expected):
        raise TrainingError(f"{path}: holds {sorted(written ^ set(expected))} too many or too few")
    for key, tensor in expected.items():
        # Opened for each, since an open file keeps in memory what was read of it.
        with safe_open(path, framework="pt") as file:
            read = file.get_tensor(key)
        # Asked first, since NaN differs from itself.
        if not read.isfinite().all():
            raise TrainingError(f"{path}: {key} has values that are not finite; nothing was kept of this stage")
        if read.shape != tensor.shape or not torch.equal(read, tensor):
            raise TrainingError(f"{path}: {key} reads back other than it was written")
        if not read.any():
            raise TrainingError(f"{path}: {key} is all zero; it was never trained")


def read_adapter(folder: Path, base: Path, tokenizer: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, by key, once its files, base and tokenizer are seen to be the right ones."""
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    check_belongs(folder, manifest, base, tokenizer)
    tensors = load_file(weights_of(folder))
    for key, description in manifest.tensors.items():
        if key not in tensors or list(tensors[key].shape) != description["shape"]:
            raise ModelError(f"{folder}: {key} is missing or not of shape {description['shape']}")
    return tensors
