"""What one checkpoint's folder holds: tensors.safetensors, state.json, and manifest.json that says what the two must be."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from orchestrator.model.tensor_stream import TensorStream
from orchestrator.plan.checkpoints import MANIFEST_NAME
from orchestrator.store import sha256_now, sync_folder

FORMAT = 1
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As safetensors calls them."""
TENSORS_NAME = "tensors.safetensors"
STATE_NAME = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A generation that was found whole."""

    step: int
    tensors: dict[str, Tensor]
    """On the host, in memory of their own."""
    state: dict[str, Any]
    bytes: int
    """Size of the files that hold tensors and state."""


class DamagedCheckpoint(Exception):
    """What is wrong with a checkpoint, without where it is."""


@dataclass(frozen=True)
class _File:
    """What a file must be."""

    sha256: str
    size: int


def write_tensors(folder: Path, tensors: TensorStream) -> None:
    """Each part goes to its place in the file as it comes; `write_files` flushes them.

    Raises OSError when the disk does not take it, with the rest of the stream unread.
    """
    header, starts = _header(tensors.layout)
    with (folder / TENSORS_NAME).open("xb", buffering=0) as file:
        _write_at(file.fileno(), 0, torch.frombuffer(header, dtype=torch.uint8))
        for name, first, values in tensors.parts:
            _write_at(file.fileno(), starts[name] + first * values.element_size(), values)


def write_files(folder: Path, fingerprint: str, step: int, state: Mapping[str, Any]) -> int:
    """Completes a folder that has its tensors and flushes it to disk, the manifest last; the size of both in bytes.

    Raises OSError when the disk does not take it.
    """
    _write_json(folder / STATE_NAME, state)
    with (folder / TENSORS_NAME).open("rb") as file:
        os.fsync(file.fileno())
    names = (STATE_NAME, TENSORS_NAME)
    files = {name: _File(sha256_now(folder / name), (folder / name).stat().st_size) for name in names}
    listed = {name: asdict(file) for name, file in files.items()}
    manifest = {"format": FORMAT, "fingerprint": fingerprint, "step": step, "files": listed}
    _write_json(folder / MANIFEST_NAME, manifest)
    sync_folder(folder)
    return sum(file.size for file in files.values())


def read_files(folder: Path, step: int, fingerprint: str) -> Checkpoint:
    """Raises DamagedCheckpoint unless the folder holds this step of this stage and every byte is what was written.

    Takes twice the memory of the files for the time of reading.
    """
    files = _read_manifest(folder, step, fingerprint)
    for name, file in files.items():
        _check_size(folder / name, file)
    state = json.loads(_verified_content(folder / STATE_NAME, files[STATE_NAME]))
    tensors = load(_verified_content(folder / TENSORS_NAME, files[TENSORS_NAME]))
    return Checkpoint(step, tensors, state, sum(file.size for file in files.values()))


def _header(layout: Mapping[str, Tensor]) -> tuple[bytearray, dict[str, int]]:
    """The beginning of a safetensors file, and where each tensor's bytes start in it."""
    entries, ends = {}, 0
    # Wide ones first, so that each lies at a multiple of its width.
    for name in sorted(layout, key=lambda name: -layout[name].element_size()):
        tensor = layout[name]
        begin, ends = ends, ends + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, ends]}
    text = json.dumps(entries, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = bytearray(len(text).to_bytes(8, "little") + text)
    return header, {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()}


def _write_at(file: int, place: int, values: Tensor) -> None:
    left = values.contiguous().view(torch.uint8).numpy().data
    while left:
        written = os.pwrite(file, left, place)
        left, place = left[written:], place + written


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("x", encoding="utf-8") as file:
        json.dump(dict(value), file, indent=2, ensure_ascii=False, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def _read_manifest(folder: Path, step: int, fingerprint: str) -> dict[str, _File]:
    """What the files of a generation must be, by name."""
    if not (folder / MANIFEST_NAME).is_file():
        raise DamagedCheckpoint(f"{MANIFEST_NAME} is missing")
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    except ValueError as error:
        raise DamagedCheckpoint(f"{MANIFEST_NAME} is not JSON ({error})") from error
    try:
        if manifest["format"] != FORMAT:
            raise DamagedCheckpoint(f"{MANIFEST_NAME} is of format {manifest['format']}; this version reads format {FORMAT}")
        if manifest["fingerprint"] != fingerprint:
            raise DamagedCheckpoint(f"it belongs to another stage (its fingerprint is {manifest['fingerprint']})")
        if manifest["step"] != step:
            raise DamagedCheckpoint(f"it is the checkpoint of step {manifest['step']}, under another's name")
        files = {name: _File(**entry) for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{MANIFEST_NAME} does not say what it should ({error!r})") from error
    # Two names and no others, so none can lead out of the folder.
    if files.keys() != {STATE_NAME, TENSORS_NAME}:
        listed = ", ".join(sorted(files)) or "nothing"
        raise DamagedCheckpoint(f"{MANIFEST_NAME} lists {listed} instead of {STATE_NAME}, {TENSORS_NAME}")
    return files


def _check_size(path: Path, file: _File) -> None:
    """Asked of all files before any is read, since it costs nothing."""
    if not path.is_file():
        raise DamagedCheckpoint(f"{path.name} is missing")
    size = path.stat().st_size
    if size != file.size:
        problem = "is truncated" if size < file.size else "is too long"
        raise DamagedCheckpoint(f"{path.name} {problem}: {size} bytes of {file.size}")


def _verified_content(path: Path, file: _File) -> bytes:
    """The bytes that are hashed are the bytes that are used."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise DamagedCheckpoint(f"{path.name} is not what was written (its sha256 differs)")
    return content
