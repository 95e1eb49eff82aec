"""A process that has imported everything and forks a training process in milliseconds: a restart waits for no import.

A worker starts it as `python -m orchestrator.cluster.forkserver <socket> <module>...`. For each byte that comes with
a socket it forks a process that talks over that socket; it tells their pids and how they ended, and takes them with it
when the worker is gone. Measured on two cores: 5 to 8 seconds of imports against 10 milliseconds.
"""

import importlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NoReturn

from orchestrator.cluster.messages import Died
from orchestrator.cluster.rank_process import run_rank

NODE_VARIABLE = "ORCHESTRATOR_RAY_NODE"
"""In the environment of a forkserver: the Ray node that it is on, as id@address of the cluster."""
_FEW_KERNELS = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""On a CPU torch keeps a kernel for each shape that it multiplied in bf16, a thousand of half a MB each. Packed samples come
in ever new shapes: memory grew by a third in a hundred micro-batches. Of more than these few none is needed twice."""
_STARTED, _ENDED = b"s", b"e"
_MESSAGE = struct.Struct("!cii")
"""What happened, to which pid, and with which wait status."""


class Forkserver:
    """One of them, as its worker sees it, and the processes that it forked."""

    def __init__(self, preloaded: Sequence[str], node: str = "") -> None:
        ours, theirs = socket.socketpair()
        # NVML tells how many GPUs there are without a CUDA context, after which a process could not be forked.
        own = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTORCH_NVML_BASED_CUDA_CHECK": "1", NODE_VARIABLE: node}
        self._complaints = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            # Unbuffered, since a process that dies flushes nothing.
            [sys.executable, "-u", "-m", "orchestrator.cluster.forkserver", str(theirs.fileno()), *preloaded],
            pass_fds=[theirs.fileno()],
            env=_FEW_KERNELS | os.environ | own,
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
            with suppress(ConnectionError):
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
            while len(message := stream.read(_MESSAGE.size)) == _MESSAGE.size:
                kind, pid, status = _MESSAGE.unpack(message)
                with self._news:
                    if kind == _ENDED:
                        self._statuses[pid] = status
                    else:
                        self._pids.append(pid)
                        # Of an earlier process with this number.
                        self._statuses.pop(pid, None)
                    self._news.notify_all()
        self._process.wait()
        with self._news:
            self._over = True
            self._news.notify_all()


def serve(channel: socket.socket, modules: Sequence[str]) -> None:
    """Forks until the other end of the channel is closed."""
    # Ctrl-C in a terminal reaches every process of its group; what should stop is said over the sockets.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in modules:
        importlib.import_module(module)
    bell, ringing = socket.socketpair()
    ringing.setblocking(False)
    signal.set_wakeup_fd(ringing.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: set[int] = set()
    while True:
        ready, _, _ = select.select([channel, bell], [], [])
        if bell in ready:
            bell.recv(4096)
            _bury(channel, children)
        if channel in ready:
            request, sockets, _, _ = socket.recv_fds(channel, 1, 1)
            if not request:
                break
            children.add(_fork(channel, (bell, ringing), sockets[0]))
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _fork(channel: socket.socket, bell: Sequence[socket.socket], handle: int) -> int:
    # What a rank starts may outlive it, and must not keep its connection open.
    os.set_inheritable(handle, False)
    if _cuda_is_up():
        # A forked process cannot use the GPU then; this one becomes the training process, and the worker starts another.
        channel.sendall(_MESSAGE.pack(_STARTED, os.getpid(), 0))
        _become_rank((channel, *bell), handle)
    pid = os.fork()
    if pid == 0:
        _become_rank((channel, *bell), handle)
    os.close(handle)
    channel.sendall(_MESSAGE.pack(_STARTED, pid, 0))
    return pid


def _become_rank(not_its_own: Sequence[socket.socket], handle: int) -> NoReturn:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for end in not_its_own:
        end.close()
    run_rank(Connection(handle))


def _bury(channel: socket.socket, children: set[int]) -> None:
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            children.discard(pid)
            channel.sendall(_MESSAGE.pack(_ENDED, pid, status))


def _cuda_is_up() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
