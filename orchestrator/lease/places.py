"""Where the leases of a stage lie: in its folder, or in the object store that the folder mirrors.

Both let one of several at once make a lease. They differ in what a holder that was given up can still do: a file is renewed
through the descriptor that it was made with, so its holder writes into its own, removed file and never into its successor's;
an object has no such handle.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orchestrator.lease.holder import Holder, read_holder
from orchestrator.run_root import RunRoot

_CLAIM_PREFIX = ".lease-"


@dataclass(frozen=True)
class Found:
    """A lease as it was seen; two that are equal are one, unchanged. `modified` tells two files apart that are empty."""

    content: bytes
    inode: int = 0
    modified: int = 0
    """Nanoseconds."""

    @property
    def holder(self) -> Holder | None:
        return read_holder(self.content)

    @property
    def who(self) -> str:
        return str(self.holder or "a run that has not said who it is")


class Made(Protocol):
    """A lease in the hands of the process that made it."""

    may_overwrite: bool
    """Whether `renew` would replace a lease that another has made since in the same place."""

    def renew(self, content: bytes) -> None: ...

    def close(self) -> None:
        """Lets go of it without removing it."""


class Place(Protocol):
    """The leases of one stage, by name. All methods raise OSError or StorageError when the storage does not do it."""

    @property
    def expires_seconds(self) -> float:
        """A lease that did not change for so long is of nobody."""
        ...

    @property
    def where(self) -> str:
        """The stage's folder, for people."""
        ...

    def create(self, name: str, content: bytes) -> Made | None:
        """Makes a lease; None when there is one."""

    def look(self, name: str) -> Found | None: ...

    def remove(self, name: str) -> None: ...

    def claim(self, digest: str) -> str:
        """The name of the lease that whoever removes a dead one must hold."""
        ...

    def remove_claims(self) -> None:
        """What killed takers left. With the dead lease gone, a claim to it says nothing, even one that is still held."""


@dataclass(frozen=True)
class InFolder:
    """Files in a folder that one or many machines see: made with O_EXCL, which one of several gets, locally as on NFS."""

    folder: Path
    """Need not exist yet."""
    expires_seconds: float = 20.0

    @property
    def where(self) -> str:
        return str(self.folder)

    def create(self, name: str, content: bytes) -> Made | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / name
        try:
            made = _MadeFile(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
        except FileExistsError:
            return None
        try:
            made.renew(content)
        except BaseException:
            made.close()
            path.unlink(missing_ok=True)
            raise
        return made

    def look(self, name: str) -> Found | None:
        try:
            # NFS asks the server anew when a file is opened, and only then.
            with (self.folder / name).open("rb") as file:
                status = os.fstat(file.fileno())
                return Found(file.read(), status.st_ino, status.st_mtime_ns)
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def claim(self, digest: str) -> str:
        return f"{_CLAIM_PREFIX}{digest}"

    def remove_claims(self) -> None:
        for claim in self.folder.glob(f"{_CLAIM_PREFIX}*"):
            claim.unlink(missing_ok=True)


@dataclass
class _MadeFile:
    descriptor: int
    may_overwrite = False

    def renew(self, content: bytes) -> None:
        os.pwrite(self.descriptor, content, 0)
        os.fsync(self.descriptor)

    def close(self) -> None:
        os.close(self.descriptor)


@dataclass(frozen=True)
class InStore:
    """Objects of a store: made on the condition that there is none, which S3 and GCS let one of several do."""

    root: RunRoot
    stage: str
    """The name of its folder."""
    # A request that goes astray is given up, and tried again, after up to a minute; that alone must not cost the stage.
    expires_seconds: float = 120.0

    @property
    def where(self) -> str:
        return f"{self.root.url}/{self.stage}"

    def create(self, name: str, content: bytes) -> Made | None:
        path = f"{self.stage}/{name}"
        # A store whose answer was lost is asked again, and then finds what the first request made.
        if self.root.create(path, content) or self.root.read(path) == content:
            return _MadeObject(self.root, path)
        return None

    def look(self, name: str) -> Found | None:
        content = self.root.read(f"{self.stage}/{name}")
        return None if content is None else Found(content)

    def remove(self, name: str) -> None:
        self.root.delete(f"{self.stage}/{name}")

    def claim(self, digest: str) -> str:
        # Where all of an unfinished stage's loose ends are, and go when it is done.
        return f"work/{_CLAIM_PREFIX}{digest}"

    def remove_claims(self) -> None:
        """They are too few and too small to be searched for."""


@dataclass
class _MadeObject:
    root: RunRoot
    path: str
    may_overwrite = True

    def renew(self, content: bytes) -> None:
        self.root.write(self.path, content)

    def close(self) -> None:
        """There is nothing open."""
