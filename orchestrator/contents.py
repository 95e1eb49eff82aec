"""What a recipe's names stand for: the files behind a source, and what base models and tokenizers hash to.

A source is a file, a folder, a glob, a hub id (owner/name), `sample:NAME` (the text that ships with the project),
or any URL that fsspec opens.
"""

import glob
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from orchestrator.errors import DataError, ModelError
from orchestrator.store import sha256_file, sha256_folder, sha256_value

SAMPLE = "sample:"
SAMPLE_FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "sample"
DATA_SUFFIXES = (".jsonl", ".json", ".txt", ".parquet")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")
"""A name without a folder in it. transformers would unpickle a file that is called anything else."""
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class DataFile:
    """One file of text or instructions."""

    url: str
    """An absolute path, a URL for fsspec, or sample:NAME."""
    sha256: str
    weight: float = 1.0
    """How often its documents are learned in one pass over the data."""

    @property
    def location(self) -> str:
        """The path or URL where this machine finds it; the project need not lie in the same place everywhere."""
        return str(SAMPLE_FOLDER / self.url.removeprefix(SAMPLE)) if self.url.startswith(SAMPLE) else self.url

    @property
    def name(self) -> str:
        return self.location.rsplit("/", 1)[-1]


def find_data(field: str, sources: Sequence[str]) -> tuple[DataFile, ...]:
    """The files behind a recipe's sources, in order; DataError names `field` and the source that yields none."""
    return tuple(file for source in sources for file in _files_of(field, source))


def data_hash(files: Sequence[DataFile]) -> str:
    """What the data is, wherever it lies: the order and the bytes of its files, and their weights."""
    return sha256_value([file.sha256 if file.weight == 1 else [file.sha256, file.weight] for file in files])


def base_model_folder(base_model: str) -> Path:
    """The local folder of a base model; a hub id is fetched once into the hub's own cache.

    Raises ModelError when there is no such folder, or it lacks weights, configuration or tokenizer.
    """
    folder = Path(base_model).expanduser()
    if not folder.is_dir():
        folder = _fetch_from_hub(base_model)
    folder = folder.resolve()
    try:
        _check_complete(folder)
        _check_vocabulary(folder)
    except ModelError as error:
        raise ModelError(f"base_model: {error}") from error
    return folder


def stated_license(folder: Path) -> str | None:
    """The licence that a model's own card names in its metadata; None where it names none."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    metadata = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    stated = re.search(r"^license:\s*['\"]?([\w.-]+)", metadata[1], re.MULTILINE) if metadata else None
    return stated[1] if stated else None


def weight_files(folder: Path) -> tuple[str, ...]:
    """The files that transformers takes a model's weights from: model.safetensors, or those that the index lists.

    None where there is neither. ModelError where the index names anything but safetensors files of this folder.
    """
    if (folder / _WEIGHTS).is_file():
        return (_WEIGHTS,)
    index = folder / _INDEX
    if not index.is_file():
        return ()
    weight_map = json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map, which says in which file each tensor lies; fetch the model again")
    for name in weight_map.values():
        # Files are read under these names, and written under them when the model is resized.
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise ModelError(
                f"{index} names {name!r}, which is no safetensors file of its own folder; do not use this model"
            )
        if not (folder / name).is_file():
            raise ModelError(f"{folder} has no {name}, which its {_INDEX} lists; fetch the model again")
    return tuple(sorted(set(weight_map.values())))


def copy_tokenizer(source: Path, target: Path) -> None:
    """All files that make a tokenizer, from one folder to another."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def base_model_hash(folder: Path) -> str:
    """What a base model computes: its configuration and weights, without its tokenizer."""
    return sha256_value(sha256_folder(folder, ("config.json", *weight_files(folder))))


def json_object(path: Path) -> dict[str, Any]:
    """What a JSON file of a model says; ModelError where it is no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}); fetch the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object; fetch the model again")
    return value


def linear_layers(folder: Path) -> tuple[str, ...]:
    """Full names of the matrices inside a base model's blocks, block by block, read from the headers of its files alone."""
    names: set[str] = set()
    for name in weight_files(folder):
        for key, tensor in _safetensors_header(folder / name).items():
            if key != "__metadata__" and len(tensor["shape"]) == 2 and re.search(r"\.\d+\.", key):
                names.add(key.removesuffix(".weight"))
    return tuple(sorted(names, key=lambda name: ([int(number) for number in re.findall(r"\.(\d+)\.", name)], name)))


def has_biases(folder: Path) -> bool:
    """Whether any layer of a base model has a bias."""
    return any(key.endswith(".bias") for name in weight_files(folder) for key in _safetensors_header(folder / name))


def tokenizer_hash(folder: Path) -> str:
    """What a tokenizer computes: the files that decide its ids."""
    present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not present:
        raise ModelError(f"{folder} has no tokenizer files; expected one of {', '.join(TOKENIZER_FILES)}")
    return sha256_value(sha256_folder(folder, present))


def _check_complete(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json; give a folder in Hugging Face format")
    if not weight_files(folder):
        raise ModelError(f"{folder} has no {_WEIGHTS} and no {_INDEX}; {_instead_of_weights(folder)}")
    for name in weight_files(folder):
        _safetensors_header(folder / name)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(f"{folder} has no tokenizer; put its tokenizer.json or tokenizer.model beside the weights")


def _instead_of_weights(folder: Path) -> str:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if not pickled:
        return "give a model whose weights are safetensors, as transformers saves them"
    return (
        f"its weights are pickled ({', '.join(pickled)}), and loading a pickle can run any code that was put into it: "
        "take the model in safetensors, or convert it where it can do no harm (save_pretrained of transformers does)"
    )


def _check_vocabulary(folder: Path) -> None:
    """ModelError where the base model has fewer rows than its tokenizer has tokens; such ids would be out of range."""
    path = folder / "tokenizer.json"
    rows = json_object(folder / "config.json").get("vocab_size")
    if rows is None or not path.is_file():
        return
    tokenizer = json_object(path)
    vocabulary = tokenizer["model"]["vocab"]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    tokens = max([*ids, *(token["id"] for token in tokenizer.get("added_tokens", []))]) + 1
    if rows < tokens:
        raise ModelError(
            f"{folder} has {rows:,} rows in its embedding (vocab_size in config.json), but its tokenizer "
            f"has {tokens:,} tokens; use the tokenizer that the model was trained with"
        )


def _safetensors_header(path: Path) -> dict[str, Any]:
    """Shapes and dtypes by tensor; ModelError where the file is none of safetensors, whatever it is called."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        # Another file's first bytes say any number; the library itself refuses larger headers.
        content = file.read(size) if size <= _MAX_HEADER_BYTES else b""
    try:
        header = json.loads(content)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise ModelError(f"{path} is no safetensors file, whatever its name says; fetch the model again")
    return header


def _files_of(field: str, source: str) -> list[DataFile]:
    if source.startswith(SAMPLE):
        found = _local_files(field, source, SAMPLE_FOLDER / source.removeprefix(SAMPLE))
        return [DataFile(f"{SAMPLE}{Path(file.url).relative_to(SAMPLE_FOLDER)}", file.sha256) for file in found]
    if "://" in source:
        return _remote_files(field, source)
    path = Path(source).expanduser()
    if path.exists() or glob.has_magic(source) or not _HUB_ID.fullmatch(source) or path.suffix in DATA_SUFFIXES:
        return _local_files(field, source, path)
    return _remote_files(field, f"hf://datasets/{source}")


def _local_files(field: str, source: str, path: Path) -> list[DataFile]:
    if path.is_dir():
        found = sorted(child for child in path.rglob("*") if child.suffix in DATA_SUFFIXES and child.is_file())
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
    if not found:
        hint = f"holds no {', '.join(DATA_SUFFIXES)} file" if path.is_dir() else "is no file, folder or pattern that matches"
        looked_in = SAMPLE_FOLDER if path.is_relative_to(SAMPLE_FOLDER) else Path.cwd()
        raise DataError(f"{field}: {source} {hint} (looked in {looked_in})")
    for file in found:
        _check_file(field, file.name, str(file), file.stat().st_size)
    return [DataFile(str(file.resolve()), sha256_file(file)) for file in found]


def _remote_files(field: str, source: str) -> list[DataFile]:
    try:
        filesystem, path = fsspec.core.url_to_fs(source)
        found = [path] if filesystem.isfile(path) else filesystem.glob(path if glob.has_magic(path) else f"{path}/**")
        details = [filesystem.info(name) for name in sorted(found) if name.endswith(DATA_SUFFIXES)]
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{field}: {source} is no local file, and could not be read as a URL or hub id: {error}") from error
    if not details:
        raise DataError(f"{field}: {source} holds no {', '.join(DATA_SUFFIXES)} file")
    return [DataFile(filesystem.unstrip_protocol(info["name"]), _remote_hash(filesystem, info)) for info in details]


def _remote_hash(filesystem: Any, info: dict[str, Any]) -> str:
    """The store's own content hash where it keeps one, else a hash of the bytes."""
    for key in ("sha256", "blob_id", "ETag", "etag"):
        if info.get(key):
            return sha256_value([key, str(info[key])])
    digest = hashlib.sha256()
    with filesystem.open(info["name"], "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _check_file(field: str, name: str, path: str, size: int) -> None:
    if not name.endswith(DATA_SUFFIXES):
        raise DataError(f"{field}: {path} is none of {', '.join(DATA_SUFFIXES)}")
    if size == 0:
        raise DataError(f"{field}: {path} is empty")


def _fetch_from_hub(base_model: str) -> Path:
    if not _HUB_ID.fullmatch(base_model):
        raise ModelError(f"base_model: {base_model} is no folder (looked in {Path.cwd()}) and no hub id (owner/name)")
    from huggingface_hub import snapshot_download  # noqa: PLC0415  slow to import, and rarely needed
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    patterns = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja"]
    try:
        return Path(snapshot_download(base_model, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(f"base_model: {base_model} is no local folder, and the hub did not give it: {error}") from error
