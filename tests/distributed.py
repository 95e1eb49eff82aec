"""Runs a function on several ranks of this machine: fresh processes, with torch.distributed up over gloo."""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_EXIT_SECONDS = 20
_GLOO_TIMEOUT = timedelta(seconds=240)


def run_on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout_seconds: float = 300) -> Any:
    """What `function(*arguments)` returns on rank 0. Function, arguments and result must be picklable.

    Raises RuntimeError with a failed rank's traceback, TimeoutError when a rank is late; no process is left behind.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    # Kept by this process at a port that the system chose; a port that is only found free may be taken before it is used.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        context.Process(target=_rank, args=(function, arguments, rank, world_size, store.port, sender), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            # The child has its own copy; with ours closed, its death is the end of the pipe.
            sender.close()
        result = _collect([receiver for receiver, _ in pipes], time.monotonic() + timeout_seconds)
        for process in processes:
            process.join(_EXIT_SECONDS)
        return result
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def _collect(receivers: list[Connection], deadline: float) -> Any:
    waiting = {receiver: rank for rank, receiver in enumerate(receivers)}
    results = {}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} did not finish in time")
        for receiver in [each for each in waiting if each in ready]:
            rank = waiting.pop(receiver)
            try:
                error, results[rank] = receiver.recv()
            except EOFError as died:
                raise RuntimeError(f"rank {rank} of {len(receivers)} died without a word") from died
            if error:
                raise RuntimeError(f"rank {rank} of {len(receivers)} failed:\n{error}")
    return results[0]


def _rank(
    function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, world_size: int, port: int, sender: Connection
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # The ninja that builds DeepSpeed's op lies beside this Python, which need not be on the PATH.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=_GLOO_TIMEOUT)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=_GLOO_TIMEOUT)
        result = function(*arguments)
        sender.send((None, result if rank == 0 else None))
        dist.destroy_process_group()
    except Exception:  # noqa: BLE001  whatever it is, the test shows it
        sender.send((traceback.format_exc(), None))
