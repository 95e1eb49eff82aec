"""How a process that has imported the training code is started, shared by the workers of a machine, and asked to fork."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

from orchestrator.cluster.forkserver import ENDED, MESSAGE, NO_LISTENING
from orchestrator.cluster.messages import Died

PRELOADED = ("orchestrator.stages.train",)
"""What a training process imports, which takes longer than all else at its start."""
NODE_VARIABLE = "ORCHESTRATOR_RAY_NODE"
"""In the environment of a forkserver: the Ray node that it is on, as id@address of the cluster."""
_FEW_KERNELS = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""On a CPU torch keeps a kernel for each shape that it multiplied in bf16, a thousand of half a MB each. Packed samples come
in ever new shapes: memory grew by a third in a hundred micro-batches. Of more than these few none is needed twice."""


class Forkserver:
    """One of them, as a worker sees it, and the processes that it forked for this worker."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._news = threading.Condition()
        self._pids: list[int] = []
        self._statuses: dict[int, int] = {}
        self._over = False
        threading.Thread(target=self._listen, daemon=True).start()

    def is_alive(self) -> bool:
        return not self._over

    def fork(self) -> tuple[int, Connection]:
        """The pid of a new process, and the connection that it reads its job from; RuntimeError when it is gone."""
        ours, theirs = socket.socketpair()
        with self._news:
            before = len(self._pids)
            with suppress(ConnectionError):
                socket.send_fds(self._channel, [b"f"], [theirs.fileno()])
            theirs.close()
            self._news.wait_for(lambda: len(self._pids) > before or self._over)
            if len(self._pids) == before:
                raise RuntimeError(f"the process that imports the training code {self._ending()}")
            return self._pids[-1], Connection(ours.detach())

    def status(self, pid: int, seconds: float) -> Died:
        """How a process ended."""
        with self._news:
            self._news.wait_for(lambda: pid in self._statuses or self._over, seconds)
            code = os.waitstatus_to_exitcode(self._statuses[pid]) if pid in self._statuses else self._exit_code()
        if code is None or code >= 0:
            return Died(None, code)
        return Died(-code, None)

    def _exit_code(self) -> int | None:
        """Of the forkserver itself, with which all that it forked ends; None where nobody knows."""
        return None

    def _wait_for_end(self) -> None:
        """Once it says no more."""

    def _ending(self) -> str:
        return "is gone"

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
                        # Of an earlier process with this number.
                        self._statuses.pop(pid, None)
                    self._news.notify_all()
        self._wait_for_end()
        with self._news:
            self._over = True
            self._news.notify_all()


class OwnForkserver(Forkserver):
    """One that ends with this process. `listening` is where others may reach it."""

    def __init__(self, preloaded: Sequence[str], node: str = "", listening: socket.socket | None = None) -> None:
        ours, theirs = socket.socketpair()
        # NVML tells how many GPUs there are without a CUDA context, after which a process could not be forked.
        own = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTORCH_NVML_BASED_CUDA_CHECK": "1", NODE_VARIABLE: node}
        self._complaints = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        handles = [str(theirs.fileno()), str(listening.fileno()) if listening else NO_LISTENING]
        self._process = subprocess.Popen(
            # Unbuffered, since a process that dies flushes nothing.
            [sys.executable, "-u", "-m", "orchestrator.cluster.forkserver", *handles, *preloaded],
            pass_fds=[theirs.fileno(), *([listening.fileno()] if listening else [])],
            env=_FEW_KERNELS | os.environ | own,
            stdin=subprocess.DEVNULL,
            stdout=self._complaints,
            stderr=self._complaints,
            # What a terminal sends to the command is not meant for it.
            start_new_session=True,
        )
        theirs.close()
        super().__init__(ours)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends it with all that it forked."""
        self._process.kill()
        self._process.wait()

    def _exit_code(self) -> int | None:
        return self._process.poll()

    def _wait_for_end(self) -> None:
        self._process.wait()

    def _ending(self) -> str:
        self._complaints.seek(0)
        return f"ended with {self._process.wait()}:\n{self._complaints.read()}"


@contextmanager
def shared_forkserver(preloaded: Sequence[str]) -> Iterator[str]:
    """One for all workers of this machine, by whose name they reach it; it imports while the caller goes on."""
    name = f"orchestrator-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX) as listening:
        # An abstract address, which leaves no file behind.
        listening.bind(f"\0{name}")
        listening.listen()
        server = OwnForkserver(preloaded, listening=listening)
    try:
        yield name
    finally:
        server.kill()


def reach(name: str) -> Forkserver | None:
    """The one of this name, if it is there."""
    channel = socket.socket(socket.AF_UNIX)
    try:
        channel.connect(f"\0{name}")
    except ConnectionRefusedError:
        channel.close()
        return None
    return Forkserver(channel)
