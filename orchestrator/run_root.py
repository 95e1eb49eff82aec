"""Where a recipe's results go: a local folder, or an object store with a local mirror before it.

Whatever computes works on local files, so with an object store every machine has a mirror of the run root, and the store has
the truth. A folder there is whole once the file that commits it is there: record.json of a stage, manifest.json of a
checkpoint, data.json of prepared data. It lists the others with their sha256, is uploaded last and removed first. The mirror
is a cache: what it holds counts as far as the store says the same.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import fsspec
from filelock import FileLock

from orchestrator.errors import RecipeError, StorageError
from orchestrator.store import sha256_file, sha256_now, sha256_text, sync_files, sync_folder, write_bytes

_EXTRAS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}
"""By protocol, the package it needs and the extra of this project that installs it."""
_RECORD = "record.json"
_CHECKPOINTS = "checkpoints"
_MANIFEST = "manifest.json"
_LOCAL_COMMITS = (
    f"*/{_RECORD}",
    f"*/{_CHECKPOINTS}/step-*/{_MANIFEST}",
    # Stands for a checkpoint whose successor a process died over; without that process it is nobody's.
    f"*/{_CHECKPOINTS}/.step-*.replaced/{_MANIFEST}",
)
_REQUESTS = 8
"""Small requests that are under way at once."""


@dataclass(frozen=True)
class RunRoot:
    """Plain values, so that it travels to workers. Paths given to its methods are relative to the root.

    Without a `url` all methods do nothing. With one, each raises StorageError when the store does not do what it is asked;
    what may pass by itself, fsspec has tried several times by then.
    """

    local: Path
    """The run root itself or, with a `url`, its mirror: the same path on every machine, and not there until needed."""
    url: str | None = None

    def fetch_records(self) -> None:
        """Makes the mirror show the finished stages and committed checkpoints of the store, and no others.

        Only the files that commit them are brought; `fetch` brings the rest.
        """
        if self.url is None:
            return
        remote = _Remote(self.url)
        here = {path.relative_to(self.local).as_posix() for pattern in _LOCAL_COMMITS for path in self.local.glob(pattern)}
        with ThreadPoolExecutor(_REQUESTS) as pool:
            candidates = sorted(here.union(_possible_commits(remote, pool)))
            list(pool.map(lambda relative: self._mirror(remote, relative), candidates))

    def is_committed(self, folder: str, commit_name: str) -> bool:
        """Whether a folder is whole where it counts: in the store or, without one, here."""
        if self.url is None:
            return (self.local / folder / commit_name).is_file()
        return _Remote(self.url).read(f"{folder}/{commit_name}") is not None

    def fetch(self, folder: str, commit_name: str) -> Path:
        """The folder in the mirror, brought there as far as it is missing or other than what the store's commit lists.

        Several processes of a machine may ask at once: one brings it, the others wait. Raises StorageError when it is not
        committed in the store, or a file there is not the one that was committed.
        """
        if self.url is None:
            return self.local / folder
        with self._lock(folder):
            remote = _Remote(self.url)
            commit = f"{folder}/{commit_name}"
            content = remote.read(commit)
            if content is None:
                raise StorageError(
                    f"{remote.where(commit)}: is not there, so {folder} was never finished, or was removed since"
                )
            if _content(self.local / commit) != content:
                (self.local / commit).unlink(missing_ok=True)
            for name, sha256 in _listed(remote.where(commit), content).items():
                self._fetch_file(remote, commit, f"{folder}/{name}", sha256)
            if _content(self.local / commit) != content:
                self._write_here(commit, content)
        return self.local / folder

    def committing(self, folder: str) -> AbstractContextManager[object]:
        """Held by one thread from before a folder is committed in the mirror until it is published.

        The `fetch_records` of another command on this machine would otherwise remove a commit that the store has not yet.
        """
        return nullcontext() if self.url is None else self._lock(folder)

    def publish(self, folder: str, commit_name: str) -> None:
        """Uploads a committed folder: the files that its commit lists, then the commit. A published one is left alone."""
        if self.url is None:
            return
        with self._lock(folder):
            commit = f"{folder}/{commit_name}"
            content = self._read_here(commit)
            names = _listed(str(self.local / commit), content)
            remote = _Remote(self.url)
            published = remote.read(commit)
            if published == content:
                return
            if published is not None:
                # Until its files are all replaced, what stood there is neither the old nor the new.
                remote.delete(commit)
            for name in names:
                remote.upload(self.local / folder / name, f"{folder}/{name}")
            remote.write(commit, content)

    def publish_file(self, path: str) -> None:
        """Uploads a file that belongs to no commit, as it is now: another process may go on appending to it."""
        if self.url is not None:
            _Remote(self.url).write(path, self._read_here(path))

    def remove(self, folder: str, commit_name: str) -> None:
        """Removes a folder from the store, the commit first; the mirror is the caller's."""
        if self.url is not None:
            remote = _Remote(self.url)
            remote.delete(f"{folder}/{commit_name}")
            remote.delete_folder(folder)

    def read(self, path: str) -> bytes | None:
        """A small file as it is in the store now, or None."""
        return None if self.url is None else _Remote(self.url).read(path)

    def write(self, path: str, content: bytes) -> None:
        """Writes a small file in the store, in the place of one that is there."""
        if self.url is not None:
            _Remote(self.url).write(path, content)

    def create(self, path: str, content: bytes) -> bool:
        """Writes a small file in the store unless there is one, and says whether. Of several at once, S3 and GCS let one."""
        return self.url is None or _Remote(self.url).create(path, content)

    def delete(self, path: str) -> None:
        """Removes a file from the store if it is there."""
        if self.url is not None:
            _Remote(self.url).delete(path)

    def _mirror(self, remote: "_Remote", commit: str) -> None:
        """Makes a commit in the mirror what it is in the store."""
        path = self.local / commit
        if remote.read(commit) == _content(path):
            return
        with self._lock(commit):
            # Asked again: it may have been another process' that was just publishing it.
            content = remote.read(commit)
            if content is None:
                path.unlink(missing_ok=True)
            else:
                self._write_here(commit, content)

    def _fetch_file(self, remote: "_Remote", commit: str, file: str, sha256: str) -> None:
        path = self.local / file
        if path.is_file() and sha256_file(path) == sha256:
            return
        workshop = self._folder(f".fetching/{_stage(file)}")
        # One name is enough: whoever fetches holds the lock, and what a killed process left is written over.
        partial = workshop / "partial"
        remote.download(file, partial)
        if sha256_now(partial) != sha256:
            partial.unlink()
            raise StorageError(
                f"{remote.where(file)}: is not the file that {commit} lists (its sha256 differs); "
                f"restore it, or remove {remote.where(commit)} to have it made again"
            )
        with _told(str(path), "written"):
            sync_files(workshop)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(path)
            sync_folder(path.parent)

    def _read_here(self, path: str) -> bytes:
        with _told(str(self.local / path), "read"):
            return (self.local / path).read_bytes()

    def _write_here(self, path: str, content: bytes) -> None:
        with _told(str(self.local / path), "written"):
            write_bytes(self.local / path, content)

    def _folder(self, path: str) -> Path:
        folder = self.local / path
        with _told(str(folder), "made"):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _lock(self, path: str) -> FileLock:
        """One for each folder directly below the root. Who holds it may take it again in the same thread."""
        return FileLock(self._folder(".locks") / f"{_stage(path)}.lock", is_singleton=True)


def run_root(value: str) -> RunRoot:
    """The run root that a recipe names: a folder, or the URL of a store. Looks at neither.

    Raises RecipeError when nothing here opens such a URL, or it carries credentials: it goes into records, they must not.
    """
    protocol, separator, path = value.partition("://")
    if not separator:
        return RunRoot(Path(value).expanduser().resolve())
    if protocol == "file":
        if not path.startswith("/"):
            raise RecipeError(f"run_root: {value} is no absolute path; write file:///folder, or the folder alone")
        return RunRoot(Path(path).resolve())
    _check_url(protocol, path)
    _check_protocol(protocol)
    url = f"{protocol}://{path.rstrip('/')}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve()
    return RunRoot(cache / "orchestrator" / "runs" / sha256_text(url)[:16], url)


class _Remote:
    """The store, asked for paths relative to the run root."""

    def __init__(self, url: str) -> None:
        self._url = url
        with _told(url, "opened"):
            # A remembered listing would hide what other machines have written since.
            self._filesystem, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)

    def where(self, path: str) -> str:
        return f"{self._url}/{path}"

    def read(self, path: str) -> bytes | None:
        with _told(self.where(path), "read"):
            try:
                return self._filesystem.cat_file(self._inside(path))
            except FileNotFoundError:
                return None

    def write(self, path: str, content: bytes) -> None:
        with _told(self.where(path), "written"):
            self._filesystem.pipe_file(self._inside(path), content)

    def create(self, path: str, content: bytes) -> bool:
        with _told(self.where(path), "written"):
            try:
                self._filesystem.pipe_file(self._inside(path), content, mode="create")
            except FileExistsError:
                return False
        return True

    def upload(self, source: Path, path: str) -> None:
        with _told(self.where(path), "written"):
            self._filesystem.put_file(str(source), self._inside(path))

    def download(self, path: str, destination: Path) -> None:
        with _told(self.where(path), "fetched"):
            self._filesystem.get_file(self._inside(path), str(destination))

    def delete(self, path: str) -> None:
        with _told(self.where(path), "removed"), suppress(FileNotFoundError):
            self._filesystem.rm_file(self._inside(path))

    def delete_folder(self, path: str) -> None:
        with _told(self.where(path), "removed"), suppress(FileNotFoundError):
            self._filesystem.rm(self._inside(path), recursive=True)

    def folders(self, path: str) -> list[str]:
        """The names of the folders directly in a folder; none where it is not there."""
        with _told(self.where(path), "listed"):
            try:
                entries = self._filesystem.ls(self._inside(path), detail=True)
            except FileNotFoundError:
                return []
        names = [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]
        return [_inside_folder(self.where(path), name) for name in names]

    def _inside(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root


@contextmanager
def _told(where: str, what: str) -> Iterator[None]:
    """Every error becomes a StorageError that says where."""
    try:
        yield
    except Exception as error:
        # What fsspec's filesystems raise has no type in common: OSError, botocore's, google.auth's, aiohttp's, timeouts.
        raise StorageError(f"{where}: cannot be {what} ({str(error) or type(error).__name__})") from error


def _possible_commits(remote: _Remote, pool: ThreadPoolExecutor) -> Iterator[str]:
    """Where the store's folders would have the files that commit them."""
    stages = remote.folders("")
    for stage, steps in zip(stages, pool.map(lambda stage: remote.folders(f"{stage}/{_CHECKPOINTS}"), stages), strict=True):
        yield f"{stage}/{_RECORD}"
        yield from (f"{stage}/{_CHECKPOINTS}/{step}/{_MANIFEST}" for step in steps if step.startswith("step-"))


def _listed(where: str, content: bytes) -> dict[str, str]:
    """sha256 by name of the files that a commit lists, however it is written: record, manifest or summary."""
    try:
        commit = json.loads(content)
        entries = commit["files"] if "files" in commit else commit["arrays"]
        listed = {name: entry if isinstance(entry, str) else entry["sha256"] for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{where}: does not list files with their sha256 ({error!r}); restore it, or remove it"
        ) from error
    return {_inside_folder(where, name): sha256 for name, sha256 in listed.items()}


def _inside_folder(where: str, name: str) -> str:
    # An absolute path begins with an empty part.
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise StorageError(f"{where}: names {name!r}, which leads out of its folder; nothing of this project wrote that")
    return name


def _content(path: Path) -> bytes | None:
    with suppress(FileNotFoundError):
        return path.read_bytes()
    return None


def _stage(path: str) -> str:
    return path.partition("/")[0]


def _check_url(protocol: str, path: str) -> None:
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
