"""A process that holds a worker, whose rank hangs; prints the rank's pid. It stands for the process of a Ray actor.

Gets a log and, where the worker should use one, the name of a shared forkserver.
"""

import sys
import time
from pathlib import Path

from orchestrator.cluster.messages import Job, Place
from orchestrator.cluster.worker import Worker
from tests.unit.cluster.rank_bodies import hang

if __name__ == "__main__":
    worker = Worker(("torch.distributed",), *sys.argv[2:])
    worker.start(Job(hang, None, Place(0, 1, 0, 1, 0, "127.0.0.1"), "gloo", None, Path(sys.argv[1]), None))
    while not (notes := worker.report(1).notes):
        pass
    print(notes[0]["pid"], flush=True)
    time.sleep(300)
