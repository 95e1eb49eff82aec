"""Where a recipe's results go: a local folder, or an object store with a local mirror before it.

Whatever computes works on local files, so with an object store every machine has a mirror of the run root, and the store has
the truth. A folder there is whole once the file that commits it is there: record.json of a stage, manifest.json of a
checkpoint, data.json of prepared data. It lists the others with their sha256, is uploaded last and removed first. The mirror
is a cache: what it holds counts as far as the store says the same.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from orchestrator.errors import RecipeError
from orchestrator.remote import NotWhole, Remote, check_url, inside_folder, told
from orchestrator.store import sha256_file, sha256_now, sha256_text, sync_files, sync_folder, write_bytes

_RECORD = "record.json"
_CHECKPOINTS = "checkpoints"
_MANIFEST = "manifest.json"
_COMMITS = (
    _RECORD,
    f"{_CHECKPOINTS}/step-*/{_MANIFEST}",
    # Stands for a checkpoint whose successor a process died over; without that process it is nobody's.
    f"{_CHECKPOINTS}/.step-*.replaced/{_MANIFEST}",
)
"""Of a stage in the mirror."""
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

    def where(self, path: str = "") -> str:
        """For people: the place where a path of the root counts."""
        return f"{self.local if self.url is None else self.url}/{path}".rstrip("/")

    def inside(self, path: Path) -> str:
        """A path of this machine as the methods here take it."""
        return path.relative_to(self.local).as_posix()

    def fetch_records(self, stage: str | None = None) -> None:
        """Makes the mirror show the finished stages and committed checkpoints of the store, and no others; or one stage's.

        Only the files that commit them are brought; `fetch` brings the rest.
        """
        if self.url is None:
            return
        remote = Remote(self.url)
        folders = [self.local / stage] if stage else self.local.glob("*")
        paths = (path for folder in folders for pattern in _COMMITS for path in folder.glob(pattern))
        here = {self.inside(path) for path in paths}
        with ThreadPoolExecutor(_REQUESTS) as pool:
            stages = [stage] if stage else remote.folders("")
            candidates = sorted(here.union(_possible_commits(remote, stages, pool)))
            list(pool.map(lambda relative: self._mirror(remote, relative), candidates))

    def is_committed(self, folder: str, commit_name: str) -> bool:
        """Whether a folder is whole where it counts: in the store or, without one, here."""
        if self.url is None:
            return (self.local / folder / commit_name).is_file()
        return Remote(self.url).read(f"{folder}/{commit_name}") is not None

    def fetch(self, folder: str, commit_name: str) -> Path:
        """The folder in the mirror, brought there as far as it is missing or other than what the store's commit lists.

        Several processes of a machine may ask at once: one brings it, the others wait. Raises NotWhole, a StorageError, when
        it is not committed in the store, or a file there is not the one that was committed.
        """
        if self.url is None:
            return self.local / folder
        with self._lock(folder):
            remote = Remote(self.url)
            commit = f"{folder}/{commit_name}"
            content = remote.read(commit)
            if content is None:
                raise NotWhole(f"{remote.where(commit)}: is not there, so {folder} was never finished, or was removed since")
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

    def publish(self, folder: str, commit_name: str, after: str | None = None) -> None:
        """Uploads a committed folder: the files that its commit lists, then the commit. A published one is left alone.

        `after` names another commit of the folder, which was published before: files that it lists alike are there already.
        """
        if self.url is None:
            return
        with self._lock(folder):
            commit = f"{folder}/{commit_name}"
            content = self._read_here(commit)
            names = _listed(str(self.local / commit), content)
            remote = Remote(self.url)
            published = remote.read(commit)
            if published == content:
                return
            if published is not None:
                # Until its files are all replaced, what stood there is neither the old nor the new.
                remote.delete(commit)
            there = self._listed_there(remote, f"{folder}/{after}") if after else {}
            for name in names:
                if there.get(name) != names[name]:
                    remote.upload(self.local / folder / name, f"{folder}/{name}")
            remote.write(commit, content)

    def publish_file(self, path: str) -> None:
        """Uploads a file that belongs to no commit, as it is now: another process may go on appending to it."""
        if self.url is not None:
            Remote(self.url).write(path, self._read_here(path))

    def fetch_file(self, path: str) -> None:
        """Makes a file that belongs to no commit what it is in the store, unless what is here is that and more.

        No process of this machine may have it open. Without one in the store there is none here either.
        """
        if self.url is None:
            return
        content, here = Remote(self.url).read(path), _content(self.local / path)
        if content is None:
            (self.local / path).unlink(missing_ok=True)
        elif here is None or not here.startswith(content):
            self._write_here(path, content)

    def remove(self, folder: str, commit_name: str) -> None:
        """Removes a folder from the store, the commit first; the mirror is the caller's."""
        if self.url is not None:
            remote = Remote(self.url)
            remote.delete(f"{folder}/{commit_name}")
            remote.delete_folder(folder)

    def remove_inside(self, folder: str, names: Iterable[str]) -> None:
        """Removes the named folders inside a folder from the store, if they are there; what they hold counts for nothing."""
        if self.url is not None:
            remote = Remote(self.url)
            for name in sorted({*names}.intersection(remote.folders(folder))):
                remote.delete_folder(f"{folder}/{name}")

    def read(self, path: str) -> bytes | None:
        """A small file as it is in the store now, or None."""
        return None if self.url is None else Remote(self.url).read(path)

    def write(self, path: str, content: bytes) -> None:
        """Writes a small file in the store, in the place of one that is there."""
        if self.url is not None:
            Remote(self.url).write(path, content)

    def create(self, path: str, content: bytes) -> bool:
        """Writes a small file in the store unless there is one, and says whether. Of several at once, S3 and GCS let one."""
        return self.url is None or Remote(self.url).create(path, content)

    def delete(self, path: str) -> None:
        """Removes a file from the store if it is there."""
        if self.url is not None:
            Remote(self.url).delete(path)

    def _mirror(self, remote: Remote, commit: str) -> None:
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

    def _fetch_file(self, remote: Remote, commit: str, file: str, sha256: str) -> None:
        path = self.local / file
        if path.is_file() and sha256_file(path) == sha256:
            return
        workshop = self._folder(f".fetching/{_stage(file)}")
        # One name is enough: whoever fetches holds the lock, and what a killed process left is written over.
        partial = workshop / "partial"
        remote.download(file, partial)
        if sha256_now(partial) != sha256:
            partial.unlink()
            raise NotWhole(
                f"{remote.where(file)}: is not the file that {commit} lists (its sha256 differs); "
                f"restore it, or remove {remote.where(commit)} to have it made again"
            )
        with told(str(path), "written"):
            sync_files(workshop)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(path)
            sync_folder(path.parent)

    def _listed_there(self, remote: Remote, commit: str) -> dict[str, str]:
        content = remote.read(commit)
        return {} if content is None else _listed(remote.where(commit), content)

    def _read_here(self, path: str) -> bytes:
        with told(str(self.local / path), "read"):
            return (self.local / path).read_bytes()

    def _write_here(self, path: str, content: bytes) -> None:
        with told(str(self.local / path), "written"):
            write_bytes(self.local / path, content)

    def _folder(self, path: str) -> Path:
        folder = self.local / path
        with told(str(folder), "made"):
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
    check_url(protocol, path)
    url = f"{protocol}://{path.rstrip('/')}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve()
    return RunRoot(cache / "orchestrator" / "runs" / sha256_text(url)[:16], url)


def _possible_commits(remote: Remote, stages: Sequence[str], pool: ThreadPoolExecutor) -> Iterator[str]:
    """Where the store's folders would have the files that commit them."""
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
        raise NotWhole(f"{where}: does not list files with their sha256 ({error!r}); restore it, or remove it") from error
    return {inside_folder(where, name): sha256 for name, sha256 in listed.items()}


def _content(path: Path) -> bytes | None:
    with suppress(FileNotFoundError):
        return path.read_bytes()
    return None


def _stage(path: str) -> str:
    return path.partition("/")[0]
