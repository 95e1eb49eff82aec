"""What an adapter folder says about itself: what it holds, and on which base and tokenizer it was learned."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.contents import base_model_hash, tokenizer_hash
from orchestrator.errors import ModelError
from orchestrator.store import read_json, sha256_file, write_json

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1


@dataclass(frozen=True)
class Origin:
    """Where an adapter comes from."""

    stage: str
    fingerprint: str
    parents: dict[str, str]
    base_name: str
    base_hash: str
    tokenizer_hash: str
    step: int


@dataclass(frozen=True)
class Manifest:
    """Names, shapes and hashes of all that an adapter folder holds."""

    origin: Origin
    tensors: dict[str, dict[str, Any]]
    """Shape and dtype by key in adapter_model.safetensors."""
    files: dict[str, str]
    """sha256 by name."""
    format: int = MANIFEST_FORMAT


def shapes_of(tensors: "Mapping[str, Tensor]") -> dict[str, dict[str, Any]]:
    """Of each tensor, as a manifest has them."""
    return {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in tensors.items()
    }


def write_manifest(folder: Path, origin: Origin, tensors: dict[str, dict[str, Any]]) -> None:
    """Hashes every file of the folder and writes the manifest beside them."""
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST_NAME]
    write_json(
        folder / MANIFEST_NAME, asdict(Manifest(origin, tensors, {name: sha256_file(folder / name) for name in names}))
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an adapter folder; ModelError when it has none, or one of another format."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ModelError(f"{folder} has no {MANIFEST_NAME}; it is not an adapter that this project wrote")
    value = read_json(path)
    if value.get("format") != MANIFEST_FORMAT:
        raise ModelError(f"{path}: format {value.get('format')}; this version reads format {MANIFEST_FORMAT}")
    return Manifest(Origin(**value["origin"]), value["tensors"], value["files"], value["format"])


def check_files(folder: Path, manifest: Manifest) -> None:
    """ModelError names the first file that is missing or not what was written."""
    for name, digest in manifest.files.items():
        if Path(name).name != name:
            raise ModelError(f"{folder}/{MANIFEST_NAME}: {name} is not a plain file name")
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: {name} is missing; the manifest lists it")
        if sha256_file(folder / name) != digest:
            raise ModelError(
                f"{folder}: {name} is not the file that was written (its sha256 differs); restore it, or train again"
            )


def check_belongs(folder: Path, manifest: Manifest, base: Path, tokenizer: Path) -> None:
    """ModelError when the adapter was learned on another base or with another tokenizer, naming both."""
    origin = manifest.origin
    given = base_model_hash(base)
    if given != origin.base_hash:
        raise ModelError(
            f"{folder} was trained on the base {origin.base_name} ({origin.base_hash[:12]}), not on {base} ({given[:12]}); "
            "load it on the base it belongs to"
        )
    given = tokenizer_hash(tokenizer)
    if given != origin.tokenizer_hash:
        raise ModelError(
            f"{folder} was trained with the tokenizer {origin.tokenizer_hash[:12]}, not with {tokenizer} ({given[:12]}); "
            "use the tokenizer in the adapter's own folder"
        )
