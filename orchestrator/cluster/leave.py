"""The last act of a machine that is about to go: what runs there saves and moves, or says how to go on.

    python -m orchestrator.cluster.leave SECONDS

A pod runs it before it is ended, and so may anyone who takes a node of a Ray cluster away. Where the command runs it is
asked to stop, as by Ctrl-C; any other node is drained, so that its ranks save and start again elsewhere. It returns once
nothing of ours runs there, or after that many seconds, which must be fewer than the machine still has.
"""

import os
import signal
import sys
import time
from collections.abc import Collection
from contextlib import suppress

import psutil

from orchestrator.cluster.forkserver_client import NODE_VARIABLE

_COMMAND = os.path.join("launch", "run.py")
_HOLDER = "orchestrator.cluster.forkserver"
"""Part of the command line of each process that a worker holds ranks with."""
PREEMPTION = 2
"""Ray's DRAIN_NODE_REASON_PREEMPTION: the node goes, whether it is idle or not."""
_LOOK_SECONDS = 0.5


def leave(seconds: float) -> bool:
    """Whether nothing of ours runs here any more."""
    until = time.monotonic() + seconds
    if commands := _processes(_COMMAND):
        pids = {process.pid for process in commands}
        # A supervised command is asked through its supervisor.
        for process in (each for each in commands if each.ppid() not in pids):
            # It may have ended by itself just now.
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        return _wait_for_none(_COMMAND, until)
    nodes = set()
    for process in _processes(_HOLDER):
        with suppress(psutil.NoSuchProcess):
            nodes.add(process.environ().get(NODE_VARIABLE, ""))
    _drain(nodes - {""}, seconds)
    return _wait_for_none(_HOLDER, until)


def _drain(nodes: Collection[str], seconds: float) -> None:
    """Tells the cluster that these nodes go in so many seconds: whoever trains there saves and moves."""
    if not nodes:
        return
    import ray._raylet  # noqa: PLC0415  takes a second, and most machines that go run nothing

    for node in nodes:
        name, _, address = node.partition("@")
        # Compiled, and unknown to type checkers.
        client = getattr(ray._raylet, "GcsClient")(address)  # noqa: B009
        deadline = int((time.time() + seconds) * 1000)
        accepted, why = client.drain_node(name, PREEMPTION, "this machine is about to go", deadline)
        if not accepted:
            print(f"the cluster does not let this node go: {why}", file=sys.stderr)


def _wait_for_none(part: str, until: float) -> bool:
    while _processes(part):
        if time.monotonic() > until:
            return False
        time.sleep(_LOOK_SECONDS)
    return True


def _processes(part: str) -> list[psutil.Process]:
    """Those of this machine, or of this container, whose command line has an argument that ends so."""
    found = []
    for process in psutil.process_iter():
        # One that ends meanwhile is none, and neither is another user's.
        with suppress(psutil.Error):
            is_running = process.status() != psutil.STATUS_ZOMBIE
            if is_running and any(word.endswith(part) for word in process.cmdline()):
                found.append(process)
    return found


if __name__ == "__main__":
    sys.exit(not leave(float(sys.argv[1])))
