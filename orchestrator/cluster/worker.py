"""The Ray actor of one device: holds the rank's process, hears its heartbeat, and ends with the driver."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import ray.util

from orchestrator.cluster.forkserver_client import Forkserver, OwnForkserver, reach
from orchestrator.cluster.messages import Beat, Ending, Finished, Job, Listening, Note, Raised, Report
from orchestrator.cluster.rank_process import STOP

_LOOK_SECONDS = 0.2
_STACK_SECONDS = 3.0
_MEETING_SECONDS = 240.0
_END_SECONDS = 60.0
"""From a process's last word to its end: one with much memory on a GPU is not gone at once."""


class Worker:
    """At most one process at a time; its methods may be called from several threads."""

    def __init__(self, preloaded: Sequence[str], shared: str = "") -> None:
        """`shared` names a forkserver of this machine; without it, or when it is gone, the worker has one of its own."""
        self._preloaded = preloaded
        self._server: Forkserver = (reach(shared) if shared else None) or self._own_server()
        self._rank: _Rank | None = None
        self._starting = threading.Lock()

    def introduction(self) -> tuple[str, str, tuple[str, ...]]:
        """Ray's id of the node, the node's address, and the GPUs that are this worker's."""
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return context.get_node_id(), ray.util.get_node_ip_address(), tuple(gpus)

    def start(self, job: Job) -> int | None:
        """Starts the rank's process; the port of the meeting place where this rank opens it, None when it ended before.

        RuntimeError when what it needs cannot be imported.
        """
        with self._starting:
            # One that nobody waits for any more, because its start took too long.
            self.kill()
            if not self._server.is_alive():
                self._server = self._own_server()
            rank = self._rank = self._forked(job)
        return rank.port(_MEETING_SECONDS) if job.meeting is None else None

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

    def _forked(self, job: Job) -> "_Rank":
        try:
            return _Rank(self._server, job)
        except RuntimeError:
            if isinstance(self._server, OwnForkserver):
                raise
        # The shared one went while it was waited for. What ails it, this worker's own will tell.
        self._server = self._own_server()
        return _Rank(self._server, job)

    def _own_server(self) -> OwnForkserver:
        node = ""
        if ray.is_initialized():
            context = ray.get_runtime_context()
            node = f"{context.get_node_id()}@{context.gcs_address}"
        return OwnForkserver(self._preloaded, node)


class _Rank:
    """One process, from its start to its end."""

    def __init__(self, server: Forkserver, job: Job) -> None:
        self._server, self._log = server, job.log
        self._pid, self._connection = server.fork()
        self._news = threading.Condition()
        self._port: int | None = None
        self._beat, self._beat_at = Beat(0, "starting"), time.monotonic()
        self._notes: list[Any] = []
        self._ending: Ending | None = None
        # How a process ended that does not even read it is heard all the same.
        with suppress(ConnectionError):
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
        # It may be leaving already.
        with suppress(ConnectionError):
            self._connection.send(STOP)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        with self._news:
            self._news.wait_for(lambda: self._ending is not None, _END_SECONDS)

    def stack(self) -> str:
        """Asked of the process itself, which answers in its log; one that was stopped must go on for that."""
        offset = self._log.stat().st_size if self._log.exists() else 0
        self._signal(signal.SIGUSR1)
        self._signal(signal.SIGCONT)
        earlier, text, until = "", "", time.monotonic() + _STACK_SECONDS
        while (not text or text != earlier) and self._ending is None and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)
            earlier, text = text, _read_from(self._log, offset)
        return text

    def _signal(self, number: signal.Signals) -> None:
        if self._ending is None:
            # It may have ended, and its end not be known here yet.
            with suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def _listen(self) -> None:
        said: Ending | None = None
        with suppress(EOFError, ConnectionError):
            while True:
                message = self._connection.recv()
                if isinstance(message, Finished | Raised):
                    said = message
                self._take(message)
        # Its memory and its GPU are free for the next one only when it is gone.
        died = self._server.status(self._pid, _END_SECONDS)
        with self._news:
            self._ending = said or died
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
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read().decode("utf-8", errors="replace")
