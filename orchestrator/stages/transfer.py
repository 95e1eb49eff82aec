"""How the ranks of a training stage meet the object store: it gives what a node lacks, and gets what rank 0 made.

Where the run root is a folder, all of this does nothing.
"""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from orchestrator.plan.checkpoints import CHECKPOINTS_NAME
from orchestrator.stages.assignment import TrainAssignment
from orchestrator.tracking.metrics import METRICS_NAME
from orchestrator.train.link import Link, Phase

_BEAT_SECONDS = 5.0


def bring_to_each_node(assignment: TrainAssignment, link: Link) -> None:
    """The first rank of each node fetches for all of them; all ranks must call."""
    if assignment.exchange.root.url is None:
        return
    with transferring(assignment, link, 0, "loading"):
        if os.environ["LOCAL_RANK"] == "0":
            assignment.exchange.bring()
        dist.barrier()


def hand_over(assignment: TrainAssignment) -> None:
    """Rank 0 alone: publishes adapter, results and the last of the metrics."""
    exchange = assignment.exchange
    if exchange.root.url is None:
        return
    exchange.root.publish_file(f"{exchange.stage}/{METRICS_NAME}")
    exchange.hand_over()
    # The store has them until the stage is done; on this machine, which need not be the command's, nobody else removes them.
    shutil.rmtree(assignment.folder / CHECKPOINTS_NAME, ignore_errors=True)


@contextmanager
def transferring(assignment: TrainAssignment, link: Link, step: int, phase: Phase) -> Iterator[None]:
    """Beats meanwhile: a transfer takes as long as it takes, gives up by itself, and is waited for by other ranks."""
    if assignment.exchange.root.url is None:
        yield
        return
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(_BEAT_SECONDS):
            link.beat(step, phase)

    thread = threading.Thread(target=beat, daemon=True, name="transfer")
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
