"""Processes that write checkpoints, and are killed or find the disk full while they do; forked, so they start at once."""

import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.checkpoint.files import Checkpoint
from orchestrator.checkpoint.generations import Draft, prune
from orchestrator.checkpoint.writer import CheckpointWriter
from orchestrator.errors import StorageError
from orchestrator.model.tensor_stream import TensorStream

FINGERPRINT = "f" * 64
_CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"}
"""Audit events of what a process can do to files."""


def contents(version: int, num_values: int = 1000) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint whose every part tells which version it is."""
    # Through numpy here and below: threads of torch that wait for each other are slow where other processes are busy.
    values = np.full(num_values, version, np.float32)
    tensors = {f"layer.{number}.weight": torch.from_numpy(values.copy()) for number in range(3)}
    return tensors, {"version": version}


def streamed(version: int, num_values: int = 1000) -> tuple[TensorStream, dict[str, Any]]:
    """`contents` as a writer takes them."""
    tensors, state = contents(version, num_values)
    return TensorStream.of(tensors), state


def write_generation(
    stage_folder: Path, fingerprint: str, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> int:
    """Commits a generation of tensors that are there; its size in bytes."""
    return Draft(stage_folder, step, TensorStream.of(tensors)).commit(fingerprint, state)


def version_of(checkpoint: Checkpoint | None) -> int:
    """The one version that all parts of a checkpoint are of."""
    assert checkpoint is not None
    found = {int(value) for tensor in checkpoint.tensors.values() for value in np.unique(tensor.numpy())}
    assert found == {checkpoint.state["version"]}
    return checkpoint.state["version"]


def start(target: Callable[..., None], *arguments: Any) -> tuple[ForkServerProcess, Connection]:
    """A process that runs `target(sender, *arguments)`, and the other end of its pipe."""
    context = get_context("forkserver")
    # pytest too, since a child imports the main module anew.
    context.set_forkserver_preload(["pytest", __name__, "orchestrator.checkpoint.writer"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(sender, *arguments), daemon=True)
    process.start()
    # The child has its own; with ours closed, its death is the end of the pipe.
    sender.close()
    return process, receiver


def received(receiver: Connection) -> list[Any]:
    """Everything that a process sent before its end."""
    messages = []
    with receiver:
        while True:
            try:
                messages.append(receiver.recv())
            except EOFError:
                return messages


def write_without_end(sender: Connection, stage_folder: Path, version: int) -> None:
    """Saves two versions of each step, and sends each version that was reported as committed."""

    def report(event: Mapping[str, Any]) -> None:
        assert event["event"] == "checkpoint", event
        sender.send(version)

    writer = CheckpointWriter(stage_folder, FINGERPRINT, keep=2, max_failures=1, report=report)
    for version in count(version):  # noqa: B020 - `report` sees it
        writer.save(version // 2, *streamed(version, num_values=100_000), wait=True)


def write_until(sender: Connection, stage_folder: Path, step: int, keep: int, num_changes: int) -> None:
    """Commits version 2 as a step and prunes, but is killed when about to do anything to a file for the n-th time."""
    left = num_changes

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in _CHANGES:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    write_generation(stage_folder, FINGERPRINT, step, *contents(version=2))
    sender.send("committed")
    prune(stage_folder, keep)
    sender.send("pruned")


def save_on_a_disk_that_fills_up(sender: Connection, stage_folder: Path) -> None:
    """Saves while files may be no larger than 64 KB, then while they may, and so on; sends what is reported and raised."""
    large, small = 100_000, 10
    saves = ((20, large, False), (40, large, True), (50, small, True), (60, large, True), (70, large, True))
    saves += ((80, large, False), (100, large, True), (120, large, True), (140, large, True), (160, large, False))
    writer = CheckpointWriter(stage_folder, FINGERPRINT, keep=5, max_failures=3, report=sender.send)
    try:
        for step, num_values, is_full in saves:
            _limit_file_size(1 << 16 if is_full else resource.RLIM_INFINITY)
            writer.save(step, *streamed(step, num_values), wait=True)
    except StorageError as error:
        sender.send(str(error))


def _limit_file_size(num_bytes: int) -> None:
    # Otherwise the signal ends the process before the write can fail.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
