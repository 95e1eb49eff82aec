"""Where bytes live: files that appear whole or not at all, and what they hash to.

A sha256 of a large file is remembered by path, size and modification time, so planning stays quick.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_HASH_CHUNK_BYTES = 1 << 22
_REMEMBER_ABOVE_BYTES = 1 << 20


def canonical_json(value: object) -> str:
    """The one spelling of a JSON value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_value(value: object) -> str:
    """sha256 over the canonical JSON of a value."""
    return sha256_text(canonical_json(value))


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes; raises FileNotFoundError."""
    path = path.resolve()
    status = path.stat()
    if status.st_size < _REMEMBER_ABOVE_BYTES:
        return _hash_bytes(path)
    return _remembered(path, f"{path}:{status.st_size}:{status.st_mtime_ns}:{status.st_ino}")


def sha256_now(path: Path) -> str:
    """sha256 of the bytes that are there now, whatever is remembered: a disk can lose a bit and keep size and time."""
    return _hash_bytes(path)


def sha256_folder(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """sha256 of the named files of a folder, by name."""
    return {name: sha256_file(folder / name) for name in sorted(names)}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes indented JSON so that a reader sees the old file or the new one, never a part."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, flushes it to disk and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; an artifact is as readable as any other file.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_files(folder: Path) -> None:
    """Flushes every file below a folder to disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _hash_bytes(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _remembered(path: Path, key: str) -> str:
    entry = _memory_folder() / hashlib.sha256(key.encode("utf-8")).hexdigest()
    if entry.is_file():
        return entry.read_text(encoding="ascii")
    digest = _hash_bytes(path)
    # The memory saves time and no more; a home that cannot be written to does not stop a plan.
    with suppress(OSError):
        write_bytes(entry, digest.encode("ascii"))
    return digest


def _memory_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "orchestrator" / "sha256"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
