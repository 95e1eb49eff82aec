"""An object store, asked for paths below a URL. Every error becomes a StorageError that says where."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec

from orchestrator.errors import RecipeError, StorageError

_EXTRAS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}
"""By protocol, the package it needs and the extra of this project that installs it."""


class NotWhole(StorageError):
    """The store has answered: a folder's commit, or a file that it lists, is not there or not what it must be."""


class Remote:
    """The store below a URL. It holds no connection of its own, so one may be made for every question."""

    def __init__(self, url: str) -> None:
        self._url = url
        with told(url, "opened"):
            # A remembered listing would hide what other machines have written since.
            self._filesystem, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)

    def where(self, path: str) -> str:
        return f"{self._url}/{path}"

    def read(self, path: str) -> bytes | None:
        with told(self.where(path), "read"):
            try:
                return self._filesystem.cat_file(self._inside(path))
            except FileNotFoundError:
                return None

    def write(self, path: str, content: bytes) -> None:
        with told(self.where(path), "written"):
            self._filesystem.pipe_file(self._inside(path), content)

    def create(self, path: str, content: bytes) -> bool:
        with told(self.where(path), "written"):
            try:
                self._filesystem.pipe_file(self._inside(path), content, mode="create")
            except FileExistsError:
                return False
        return True

    def upload(self, source: Path, path: str) -> None:
        with told(self.where(path), "written"):
            self._filesystem.put_file(str(source), self._inside(path))

    def download(self, path: str, destination: Path) -> None:
        """Raises NotWhole where there is no such file."""
        with told(self.where(path), "fetched", missing=NotWhole):
            self._filesystem.get_file(self._inside(path), str(destination))

    def delete(self, path: str) -> None:
        with told(self.where(path), "removed"), suppress(FileNotFoundError):
            self._filesystem.rm_file(self._inside(path))

    def delete_folder(self, path: str) -> None:
        with told(self.where(path), "removed"), suppress(FileNotFoundError):
            self._filesystem.rm(self._inside(path), recursive=True)

    def folders(self, path: str) -> list[str]:
        """The names of the folders directly in a folder; none where it is not there."""
        with told(self.where(path), "listed"):
            try:
                entries = self._filesystem.ls(self._inside(path), detail=True)
            except FileNotFoundError:
                return []
        names = [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]
        return [inside_folder(self.where(path), name) for name in names]

    def _inside(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root


@contextmanager
def told(where: str, what: str, missing: type[StorageError] = StorageError) -> Iterator[None]:
    """Every error becomes a StorageError that says where; of the type `missing`, if something was not there."""
    try:
        yield
    except Exception as error:
        # What fsspec's filesystems raise has no type in common: OSError, botocore's, google.auth's, aiohttp's, timeouts.
        kind = missing if isinstance(error, FileNotFoundError) else StorageError
        raise kind(f"{where}: cannot be {what} ({str(error) or type(error).__name__})") from error


def inside_folder(where: str, name: str) -> str:
    """The name, once it is seen to stay in its folder; NotWhole for any other."""
    # An absolute path begins with an empty part.
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise NotWhole(f"{where}: names {name!r}, which leads out of its folder; nothing of this project wrote that")
    return name


def check_url(protocol: str, path: str) -> None:
    """RecipeError unless the URL is of a folder, without credentials, and something here opens it."""
    # A secret may hold slashes, so it is looked for in all of the URL; and none of it is repeated.
    if ":" in path.partition("@")[0] and "@" in path:
        raise RecipeError(
            f"run_root: the {protocol}:// URL carries a password (user:password@), which would go into every record; "
            "take it out: credentials come from the environment"
        )
    if "?" in path:
        raise RecipeError(
            f"run_root: the {protocol}:// URL goes on after a question mark, where keys and tokens stand, which would go "
            "into every record; take that out: credentials come from the environment"
        )
    if not path.strip("/"):
        raise RecipeError(f"run_root: {protocol}:// names no place; write {protocol}://bucket/folder")
    if any(special in path for special in ("*", "[", "::")):
        raise RecipeError(f"run_root: {protocol}://{path} is a pattern or a chain (it has *, [ or ::); name one folder")
    _check_protocol(protocol)


def _check_protocol(protocol: str) -> None:
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        known = "a folder, s3://bucket/folder, gs://bucket/folder, or another URL of fsspec's"
        raise RecipeError(f"run_root: nothing opens {protocol}://; give {known}") from error
    except ImportError as error:
        if protocol not in _EXTRAS:
            raise RecipeError(f"run_root: {protocol}:// cannot be opened here ({error})") from error
        package, extra = _EXTRAS[protocol]
        advice = f"in the project's folder, pip install -e '.[{extra}]'"
        raise RecipeError(f"run_root: {protocol}:// needs {package} ({error.__cause__}); {advice}") from error
