"""The Ray actor of one device: holds the rank's process, hears its heartbeat, and ends with the driver."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ray
import ray.util

from orchestrator.cluster.forkserver import ENDED, MESSAGE
from orchestrator.cluster.messages import Beat, Died, Ending, Finished, Job, Listening, Note, Raised, Report
from orchestrator.cluster.rank_process import STOP

_STACK_SECONDS = 1.0
_MEETING_SECONDS = 60.0


class Worker:
    """At most one process at a time; its methods may be called from several threads."""

    def __init__(self, preloaded: Sequence[str]) -> None:
        self._preloaded = preloaded
        self._server = _Server(preloaded)
        self._rank: _Rank | None = None

    def introduction(self) -> tuple[str, str, tuple[str, ...]]:
        """Ray's id of the node, the node's address, and the GPUs that are this worker's."""
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return context.get_node_id(), ray.util.get_node_ip_address(), tuple(gpus)

    def start(self, job: Job) -> int | None:
        """Starts the rank's process; the port of the meeting place where this rank opens it."""
        if not self._server.is_alive():
            self._server = _Server(self._preloaded)
        self._rank = _Rank(self._server, job)
        return self._rank.port(_MEETING_SECONDS) if job.meeting is None else None

    def report(self, seconds: float) -> Report:
        """What is new, as soon as there is something to tell, or after `seconds`."""
        assert self._rank
        return self._rank.report(seconds)

    def ask_to_stop(self) -> None:
        assert self._rank
        self._rank.ask_to_stop()

    def kill(self) -> None:
        """Ends the process, whatever state it is in."""
        if self._rank:
            self._rank.kill()

    def stack(self) -> str:
        """Where each thread of the process stands."""
        assert self._rank
        return self._rank.stack()


class _Server:
    """A forkserver, and the processes that it forked."""

    def __init__(self, preloaded: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        # NVML tells how many GPUs there are without a CUDA context, after which a process could not be forked.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        self._complaints = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cluster.forkserver", str(theirs.fileno()), *preloaded],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=self._complaints,
        )
        theirs.close()
        self._channel = ours
        self._news = threading.Condition()
        self._pids: list[int] = []
        self._statuses: dict[int, int] = {}
        self._over = False
        threading.Thread(target=self._listen, daemon=True).start()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def fork(self) -> tuple[int, Connection]:
        """The pid of a new process, and the connection that it reads its job from."""
        ours, theirs = socket.socketpair()
        with self._news:
            before = len(self._pids)
            with suppress(BrokenPipeError):
                socket.send_fds(self._channel, [b"f"], [theirs.fileno()])
            theirs.close()
            self._news.wait_for(lambda: len(self._pids) > before or self._over)
            if len(self._pids) == before:
                self._complaints.seek(0)
                code, said = self._process.wait(), self._complaints.read()
                raise RuntimeError(f"the process that imports the training code ended with {code}:\n{said}")
            return self._pids[-1], Connection(ours.detach())

    def status(self, pid: int, seconds: float) -> Died:
        """How a process ended."""
        with self._news:
            self._news.wait_for(lambda: pid in self._statuses or self._over, seconds)
            code = os.waitstatus_to_exitcode(self._statuses[pid]) if pid in self._statuses else self._process.poll()
        if code is None or code >= 0:
            return Died(None, code)
        return Died(-code, None)

    def _listen(self) -> None:
        # A forkserver that ended before it read what it was sent resets the connection.
        with suppress(ConnectionResetError), self._channel.makefile("rb") as stream:
            while len(message := stream.read(MESSAGE.size)) == MESSAGE.size:
                kind, pid, status = MESSAGE.unpack(message)
                with self._news:
                    if kind == ENDED:
                        self._statuses[pid] = status
                    else:
                        self._pids.append(pid)
                    self._news.notify_all()
        self._process.wait()
        with self._news:
            self._over = True
            self._news.notify_all()


class _Rank:
    """One process, from its start to its end."""

    def __init__(self, server: _Server, job: Job) -> None:
        self._server, self._log = server, job.log
        self._pid, self._connection = server.fork()
        self._news = threading.Condition()
        self._port: int | None = None
        self._beat, self._beat_at = Beat(0, "starting"), time.monotonic()
        self._notes: list[Any] = []
        self._ending: Ending | None = None
        self._connection.send(job)
        threading.Thread(target=self._listen, daemon=True).start()

    def port(self, seconds: float) -> int | None:
        with self._news:
            self._news.wait_for(lambda: self._port is not None or self._ending is not None, seconds)
            return self._port

    def report(self, seconds: float) -> Report:
        with self._news:
            self._news.wait_for(lambda: self._notes or self._ending is not None, seconds)
            notes, self._notes = tuple(self._notes), []
            silent = time.monotonic() - self._beat_at
            return Report(self._beat, silent, notes, self._ending, self._state() in ("T", "t"))

    def ask_to_stop(self) -> None:
        if self._ending is None:
            self._connection.send(STOP)

    def kill(self) -> None:
        if self._ending is None:
            os.kill(self._pid, signal.SIGKILL)
            with self._news:
                self._news.wait_for(lambda: self._ending is not None, 30)

    def stack(self) -> str:
        """Asked of the process itself, which answers in its log; one that was stopped must go on for that."""
        if self._ending is not None:
            return ""
        before = self._log.stat().st_size
        os.kill(self._pid, signal.SIGUSR1)
        os.kill(self._pid, signal.SIGCONT)
        time.sleep(_STACK_SECONDS)
        return _read_from(self._log, before)

    def _listen(self) -> None:
        ending: Ending | None = None
        try:
            while True:
                message = self._connection.recv()
                if isinstance(message, Finished | Raised):
                    ending = message
                self._take(message)
        except (EOFError, OSError):
            ending = ending or self._server.status(self._pid, seconds=10)
        with self._news:
            self._ending = ending
            self._news.notify_all()

    def _take(self, message: object) -> None:
        with self._news:
            match message:
                case Beat():
                    self._beat, self._beat_at = message, time.monotonic()
                case Note(event):
                    self._notes.append(event)
                    self._news.notify_all()
                case Listening(port):
                    self._port = port
                    self._news.notify_all()

    def _state(self) -> str:
        """The kernel's letter: T is stopped."""
        try:
            return (
                Path(f"/proc/{self._pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
            )
        except (FileNotFoundError, ProcessLookupError):
            return "X"


def _read_from(path: Path, offset: int) -> str:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read().decode("utf-8", errors="replace")
