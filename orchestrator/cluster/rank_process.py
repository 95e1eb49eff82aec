"""One rank: a process of its own, which meets the others, runs the body and says how it went."""

import ctypes
import faulthandler
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from orchestrator.cluster.messages import Beat, Finished, Job, Listening, Note, Raised
from orchestrator.errors import OrchestratorError
from orchestrator.train.link import Phase

COLLECTIVE_SECONDS = 1800
"""How long a rank waits for the others; the watchdog notices a hang before that."""
STOP = "stop"
_DIE_WITH_PARENT = 1


def run_rank(connection: Connection) -> NoReturn:
    """Reads its job from the connection, does it and ends the process."""
    # A process that hangs in a kernel or was stopped notices no closed socket; the kernel ends it with the forkserver.
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    # Where memory runs out, a rank should end, which starts again, and not the command; a container may keep it as it is.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    link = _ConnectionLink(connection)
    outcome = _outcome(connection, link)
    # A worker that is gone is told nothing.
    with suppress(ConnectionError):
        link.send(outcome)
    # Threads and vendors' exit handlers have nothing to say any more, and some of them wait for other ranks.
    os._exit(0)


class _ConnectionLink:
    """The link over a socket. Beats come from the training thread, notes also from the one that writes checkpoints."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        # Not an Event, whose lock a signal handler would wait for when it interrupts another one.
        self._is_asked_to_stop = False

    def beat(self, step: int, phase: Phase) -> None:
        self.send(Beat(step, phase))

    def note(self, event: Mapping[str, Any]) -> None:
        self.send(Note(dict(event)))

    def should_stop(self) -> bool:
        return self._is_asked_to_stop

    def ask_to_stop(self) -> None:
        self._is_asked_to_stop = True

    def send(self, message: object) -> None:
        with self._lock:
            self._connection.send(message)

    def listen(self) -> None:
        """Until the worker is gone; a rank without its worker would train for nobody."""
        try:
            while True:
                if self._connection.recv() == STOP:
                    self.ask_to_stop()
        except (EOFError, OSError):
            os._exit(1)


def _outcome(connection: Connection, link: _ConnectionLink) -> Finished | Raised:
    try:
        job: Job = connection.recv()
        _redirect_output(job.log)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: link.ask_to_stop())
        threading.Thread(target=link.listen, daemon=True).start()
        _meet(job, link)
        return Finished(_picklable(job.body(job.assignment, link)))
    # Whatever it is, a sys.exit() too, the driver decides what follows from it.
    except BaseException as error:  # noqa: BLE001
        traceback.print_exc()
        return _raised(error)


def _raised(error: BaseException) -> Raised:
    text, now = "".join(traceback.format_exception(error)), time.time()
    if isinstance(error, OrchestratorError):
        return Raised("ours", str(error), text, error, now)
    kind = "out_of_memory" if is_out_of_memory(error) else "other"
    return Raised(kind, f"{type(error).__name__}: {error}", text, None, now)


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the host where torch or Python could not allocate."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    # torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _picklable(result: Any) -> Any:
    """The result, once it is sure that it arrives; raises here, where the log shows it, what its pickling raises."""
    pickle.loads(pickle.dumps(result))
    return result


def _meet(job: Job, link: _ConnectionLink) -> None:
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415

    place = job.place
    if job.visible_gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = job.visible_gpus
        torch.cuda.set_device(place.local_rank)
    # The ninja that builds DeepSpeed's op lies beside this Python, which need not be on the PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    timeout = timedelta(seconds=COLLECTIVE_SECONDS)
    host, port = job.meeting or (place.node, 0)
    listening = None
    if job.meeting is None:
        # By itself torch would listen on every address of the machine.
        with socket.create_server((host, 0)) as server:
            port, listening = server.getsockname()[1], server.detach()
    store = dist.TCPStore(
        host, port, place.num_workers, place.rank == 0, timeout, wait_for_workers=False, master_listen_fd=listening
    )
    if job.meeting is None:
        link.send(Listening(port))
    os.environ |= {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.num_workers),
        "LOCAL_WORLD_SIZE": str(place.local_workers),
        "NODE_RANK": str(place.node_rank),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(store.port),
    }
    dist.init_process_group(job.backend, store=store, rank=place.rank, world_size=place.num_workers, timeout=timeout)


def _redirect_output(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.close(handle)
    faulthandler.enable(all_threads=True)
    # The worker asks with this signal where the process hangs; it is answered even when Python itself stands still.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
