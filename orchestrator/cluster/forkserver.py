"""A process that has imported everything and forks a training process in milliseconds: a restart waits for no import.

Started as `python -m orchestrator.cluster.forkserver <channel> <listening> <module>...`, the first two being open sockets.
For each byte that comes over a channel with a socket it forks a process that talks over that socket; it tells their pids and
how they ended, and takes them with it when whoever holds the channel is gone. Who connects to the listening socket gets a
channel, too. It ends with the first one. Measured on two cores: 5 to 8 seconds of imports against 10 milliseconds.
"""

import importlib
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NoReturn

from orchestrator.cluster.rank_process import run_rank

NO_LISTENING = "-"
"""In the place of the listening socket."""
STARTED, ENDED = b"s", b"e"
MESSAGE = struct.Struct("!cii")
"""What happened, to which pid, and with which wait status."""
_PEER = struct.Struct("3i")
"""Linux's ucred: pid, uid, gid."""


def serve(owner: socket.socket, listening: socket.socket | None, modules: Sequence[str]) -> None:
    """Forks until the other end of the owner's channel is closed."""
    # Ctrl-C in a terminal reaches every process of its group; what should stop is said over the sockets.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in modules:
        importlib.import_module(module)
    if listening and _cuda_is_up():
        sys.exit("what was imported uses the GPU, so that no process can be forked; each worker imports for itself")
    bell, ringing = socket.socketpair()
    ringing.setblocking(False)
    signal.set_wakeup_fd(ringing.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    forks = _Forks(owner, [bell, ringing, *([listening] if listening else [])])
    while True:
        ready, _, _ = select.select([*forks.channels, bell, *([listening] if listening else [])], [], [])
        if bell in ready:
            bell.recv(4096)
            forks.bury()
        if listening in ready:
            forks.accept(listening)
        for channel in forks.channels & set(ready):
            if not forks.answer(channel):
                forks.close(channel)
        if owner not in forks.channels:
            break
    forks.kill(forks.children)


class _Forks:
    """The channels, and the processes that were asked for over them."""

    def __init__(self, owner: socket.socket, own: Sequence[socket.socket]) -> None:
        self.channels = {owner}
        self.children: dict[int, socket.socket] = {}
        """By pid; the channel may be closed meanwhile."""
        self._own = own

    def accept(self, listening: socket.socket) -> None:
        channel, _ = listening.accept()
        _, uid, _ = _PEER.unpack(channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        # What is forked does whatever it is told.
        if uid == os.getuid():
            self.channels.add(channel)
        else:
            channel.close()

    def answer(self, channel: socket.socket) -> bool:
        """Forks a process; False when nobody asks any more."""
        request, sockets = b"", []
        # Whoever was killed with unread messages resets the connection.
        with suppress(ConnectionResetError):
            request, sockets, _, _ = socket.recv_fds(channel, 1, 1)
        if request:
            self._fork(channel, sockets[0])
        return bool(request)

    def close(self, channel: socket.socket) -> None:
        self.channels.discard(channel)
        self.kill(pid for pid, asker in self.children.items() if asker is channel)
        channel.close()

    def kill(self, pids: Iterable[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def bury(self) -> None:
        """Tells whoever asked for them of processes that have ended."""
        for pid, channel in list(self.children.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self.children[pid]
                self._tell(channel, MESSAGE.pack(ENDED, pid, status))

    def _tell(self, channel: socket.socket, message: bytes) -> None:
        # One that is gone is noticed when it is read from.
        if channel in self.channels:
            with suppress(ConnectionError):
                channel.sendall(message)

    def _fork(self, channel: socket.socket, handle: int) -> None:
        # What a rank starts may outlive it, and must not keep its connection open.
        os.set_inheritable(handle, False)
        if _cuda_is_up():
            # A forked process cannot use the GPU then; this one becomes the training process, and the worker starts another.
            self._tell(channel, MESSAGE.pack(STARTED, os.getpid(), 0))
            self._become_rank(handle)
        pid = os.fork()
        if pid == 0:
            self._become_rank(handle)
        os.close(handle)
        self.children[pid] = channel
        self._tell(channel, MESSAGE.pack(STARTED, pid, 0))

    def _become_rank(self, handle: int) -> NoReturn:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in (*self.channels, *self._own):
            end.close()
        run_rank(Connection(handle))


def _cuda_is_up() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def _main(channel: str, listening: str, *modules: str) -> None:
    serve(
        socket.socket(fileno=int(channel)),
        None if listening == NO_LISTENING else socket.socket(fileno=int(listening)),
        modules,
    )


if __name__ == "__main__":
    _main(*sys.argv[1:])
