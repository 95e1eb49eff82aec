"""Who runs a stage: a file in its folder that one process at a time can hold, of all machines that see the folder.

The file is made with O_EXCL, which one of several gets, on a local disk as on NFS. Its holder rewrites it every few seconds
through the descriptor that it made it with, so that a holder which was given up writes into its own, removed file and never
into its successor's.

A holder that dies does not remove its file. On the same machine its process is looked for; of another machine's holder one
sees only whether the file changes, so it is watched, and no two machines' clocks are compared. A holder that was merely cut
off for so long learns that it has lost the stage when it next looks at the file.
"""

import getpass
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from orchestrator.errors import LeaseError, StorageError
from orchestrator.store import sha256_text

LEASE_NAME = "lease.json"
RENEW_SECONDS = 4.0
EXPIRES_SECONDS = 20.0
_CLAIM_PREFIX = ".lease-"
_LOOKS = 40
"""So often an expiring lease is looked at before it counts as dead."""


@dataclass(frozen=True)
class Holder:
    """What the file says. `since` and `renewed` are ISO 8601 of a fixed width, so that a rewritten file keeps its size."""

    id: str
    host: str
    boot_id: str
    pid_namespace: str
    """Containers of one machine share its boot, and may share its name; process numbers they do not."""
    pid: int
    process_started: int
    """Clock ticks after the boot; a later process with the same number began at another."""
    user: str
    command: str
    since: str
    renewed: str

    def __str__(self) -> str:
        since = datetime.fromisoformat(self.since).astimezone()
        held = _rough(time.time() - since.timestamp())
        return f"{self.user}@{self.host} (process {self.pid}) since {since:%Y-%m-%d %H:%M:%S} ({held}): {self.command}"


class Lease:
    """A stage that this process holds. A thread keeps renewing it."""

    def __init__(self, path: Path, descriptor: int, holder: Holder, renew_seconds: float, expires_seconds: float) -> None:
        self._path, self._descriptor, self._holder = path, descriptor, holder
        self._renew_seconds, self._expires_seconds = renew_seconds, expires_seconds
        self._renewed = _now()
        self._lost: str | None = None
        self._trouble = "the storage does not answer"
        self._has_ended = False
        self._wake, self._has_looked = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")
        self._thread.start()

    @property
    def is_lost(self) -> bool:
        """Whether the stage may be somebody else's by now. Answers at once, unless the lease is overdue."""
        if self._lost is None and self._is_overdue():
            # This process, or its machine, has been asleep. What was known before counts for nothing: look again first.
            self._has_looked.clear()
            self._wake.set()
            self._has_looked.wait(self._renew_seconds)
            if self._is_overdue():
                self._give_up_overdue()
        return self._lost is not None

    def check(self) -> None:
        """Raises LeaseError once the lease is lost; from then on nothing may be written to the stage."""
        if self.is_lost:
            raise LeaseError(f"{self._path.parent}: {self._lost}; this run stops, and writes no more to that stage")

    def release(self) -> None:
        """Ends the renewing and removes the file, if it is still ours."""
        self._has_ended = True
        self._wake.set()
        self._thread.join(self._renew_seconds)
        if self._thread.is_alive():
            # The storage hangs, and would hang us too; the descriptor is still in use. The lease dies with this process.
            return
        os.close(self._descriptor)
        # A lease that cannot be removed dies with this process.
        with suppress(OSError):
            if self._lost is None and self._is_ours(_look(self._path)):
                self._path.unlink()

    def _keep(self) -> None:
        while self._lost is None:
            self._wake.wait(self._renew_seconds)
            self._wake.clear()
            if self._has_ended:
                return
            self._renew()
            self._has_looked.set()

    def _renew(self) -> None:
        began = _now()
        try:
            found = _look(self._path)
            if self._is_ours(found):
                _write(self._descriptor, replace(self._holder, renewed=_timestamp()))
                self._renewed = began
            else:
                self._lost = f"it is now run by {found.who}" if found else f"its {self._path.name} was removed"
        except OSError as error:
            self._trouble = str(error)
            if self._is_overdue():
                self._give_up_overdue()

    def _is_ours(self, found: "_Found | None") -> bool:
        return found is not None and found.holder is not None and found.holder.id == self._holder.id

    def _is_overdue(self) -> bool:
        return _now() - self._renewed > self._expires_seconds

    def _give_up_overdue(self) -> None:
        self._lost = self._lost or (
            f"the lease could not be renewed for {self._expires_seconds:g} seconds, "
            f"after which another run may have the stage ({self._trouble})"
        )


@contextmanager
def held(
    stage_folder: Path,
    command: str,
    say: Callable[[str], None] = print,
    renew_seconds: float = RENEW_SECONDS,
    expires_seconds: float = EXPIRES_SECONDS,
) -> Iterator[Lease]:
    """Holds the stage, whose folder need not exist yet. `say` is told of waiting and of taking over.

    Raises LeaseError when another holds it, StorageError when the folder cannot be written to.
    """
    holder = _ourselves(command)
    path = stage_folder / LEASE_NAME
    try:
        stage_folder.mkdir(parents=True, exist_ok=True)
        descriptor = _Taker(holder, say, expires_seconds).take(path)
        _remove_claims(stage_folder)
    except OSError as error:
        raise StorageError(f"{path}: the stage cannot be reserved for this run: {error.strerror}") from error
    lease = Lease(path, descriptor, holder, renew_seconds, expires_seconds)
    try:
        yield lease
    finally:
        lease.release()


@dataclass(frozen=True)
class _Found:
    """A lease file as it was seen; two that are equal are one, unchanged. `modified` tells two apart that are empty."""

    content: bytes
    inode: int
    modified: int
    """Nanoseconds."""

    @property
    def holder(self) -> Holder | None:
        """None where the file is not written yet, or not by us."""
        try:
            return Holder(**json.loads(self.content))
        except (ValueError, TypeError):
            return None

    @property
    def who(self) -> str:
        return str(self.holder or "a run that has not said who it is")


@dataclass(frozen=True)
class _Taker:
    holder: Holder
    say: Callable[[str], None]
    expires_seconds: float

    def take(self, path: Path) -> int:
        """Makes the file, which only one of several can, and gives its descriptor. Raises LeaseError while another lives."""
        while True:
            with suppress(FileExistsError):
                return _create(path, self.holder)
            found = _look(path)
            if found is None:
                continue
            if self._is_dead(path, found):
                self._remove(path, found)
            elif now := _look(path):
                raise LeaseError(f"{path.parent}: is being run by {now.who}; wait for it, or stop it there")

    def _is_dead(self, path: Path, found: _Found) -> bool:
        is_gone = _is_gone(found.holder) if found.holder else None
        if is_gone is None:
            is_gone = self._stays_unchanged(path, found)
        if is_gone:
            self.say(f"{path.parent}: taken over from a run that has ended: {found.who}")
        return is_gone

    def _stays_unchanged(self, path: Path, found: _Found) -> bool:
        # Looks are counted, not seconds: a watcher that was itself asleep, or waited for its storage, has seen nothing then.
        for look in range(_LOOKS):
            if look == 1:
                waiting = f"waiting up to {self.expires_seconds:g} seconds to see whether another run goes on"
                self.say(f"{path.parent}: {waiting}: {found.who}")
            time.sleep(self.expires_seconds / _LOOKS)
            if _look(path) != found:
                return False
        return True

    def _remove(self, path: Path, dead: _Found) -> None:
        """Removes a dead lease, and never one that was made since.

        Of two that saw it dead, the slower would remove what the faster has made. So only he may remove it who holds the
        claim, a lease of its own that is named after the dead one, and who then still sees that one.
        """
        claim = path.with_name(_CLAIM_PREFIX + sha256_text(repr(dead))[:16])
        descriptor = self.take(claim)
        try:
            if _look(path) == dead:
                path.unlink()
        finally:
            os.close(descriptor)
            claim.unlink(missing_ok=True)


def _create(path: Path, holder: Holder) -> int:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    try:
        _write(descriptor, holder)
    except BaseException:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    return descriptor


def _write(descriptor: int, holder: Holder) -> None:
    os.pwrite(descriptor, (json.dumps(asdict(holder), indent=2, ensure_ascii=False) + "\n").encode("utf-8"), 0)
    os.fsync(descriptor)


def _look(path: Path) -> _Found | None:
    try:
        # NFS asks the server anew when a file is opened, and only then.
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            return _Found(file.read(), status.st_ino, status.st_mtime_ns)
    except FileNotFoundError:
        return None


def _remove_claims(folder: Path) -> None:
    """What killed takers left. With the dead lease gone, a claim to it says nothing, even one that is still held."""
    for claim in folder.glob(f"{_CLAIM_PREFIX}*"):
        claim.unlink(missing_ok=True)


def _ourselves(command: str) -> Holder:
    started, _ = _process(os.getpid())
    now = _timestamp()
    return Holder(uuid.uuid4().hex, *_machine(), os.getpid(), started, _user(), command, now, now)


def _machine() -> tuple[str, str, str]:
    """Host, boot and process namespace: where these three are the same, process numbers mean the same."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return os.uname().nodename, boot_id, os.readlink("/proc/self/ns/pid")


def _is_gone(holder: Holder) -> bool | None:
    """None where that cannot be seen from here."""
    if (holder.host, holder.boot_id, holder.pid_namespace) != _machine():
        return None
    # /proc may be mounted so that it hides what other users run; signal 0, which does nothing, still finds it.
    with suppress(PermissionError):
        try:
            os.kill(holder.pid, 0)
        except ProcessLookupError:
            return True
    try:
        started, is_running = _process(holder.pid)
    except OSError:
        return None
    return started != holder.process_started or not is_running


def _process(pid: int) -> tuple[int, bool]:
    """The start, in clock ticks after the boot, of a process of this machine, and whether any of it still runs."""
    # The second field is the program's name in brackets, and may itself hold blanks and brackets.
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    state, num_threads, started = fields[0], int(fields[17]), int(fields[19])
    # A zombie has ended, though its parent has not asked about it yet. But a process that was killed shows as one as soon as
    # its first thread is gone; another may be writing to a file still, and is then counted.
    return started, state not in "ZX" or num_threads > 1


def _user() -> str:
    try:
        return getpass.getuser()
    except KeyError:
        # A container may run under a number that has no name.
        return f"user {os.getuid()}"


def _now() -> float:
    """Seconds, those that the machine was suspended included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _timestamp() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


def _rough(seconds: float) -> str:
    """Zero at least: another machine's clock may be ahead."""
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
    return f"{max(0, int(seconds))} seconds"
