"""The process that holds a stage, as another one learns of it, and whether it is still alive."""

import getpass
import json
import os
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True)
class Holder:
    """What a lease says. `since` and `renewed` are ISO 8601 of a fixed width, so that a rewritten lease keeps its size."""

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
        held = rough_time(time.time() - since.timestamp())
        return f"{self.user}@{self.host} (process {self.pid}) since {since:%Y-%m-%d %H:%M:%S} ({held}): {self.command}"

    def as_bytes(self) -> bytes:
        return (json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def read_holder(content: bytes) -> Holder | None:
    """None where a lease is not written yet, or not by us."""
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        return None


def ourselves(command: str) -> Holder:
    """This process, as the holder of a lease that it makes now."""
    started, _ = _process(os.getpid())
    now = timestamp()
    return Holder(uuid.uuid4().hex, *_machine(), os.getpid(), started, _user(), command, now, now)


def is_gone(holder: Holder) -> bool | None:
    """Whether its process has ended; None where that cannot be seen from here."""
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


def timestamp() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


def _machine() -> tuple[str, str, str]:
    """Host, boot and process namespace: where these three are the same, process numbers mean the same."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return os.uname().nodename, boot_id, os.readlink("/proc/self/ns/pid")


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


def rough_time(seconds: float) -> str:
    """In words, such as 3 minutes. Zero at least: another machine's clock may be ahead."""
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
    return f"{max(0, int(seconds))} seconds"
