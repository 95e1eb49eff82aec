"""What the nodes of the cluster can give now. Nodes that are about to leave give nothing."""

import socket
import time
from collections.abc import Mapping
from contextlib import suppress

import ray
from ray._private.state import state

_ANSWER_SECONDS = 2.0

Bundle = Mapping[str, float]
"""What one worker takes, by resource."""


def leaving_nodes() -> dict[str, float]:
    """Nodes that will be taken away (preemption, drain), and in how many seconds; infinity where nobody said."""
    deadlines = state.get_draining_nodes()
    now = time.time()
    return {node: deadline / 1000 - now if deadline else float("inf") for node, deadline in deadlines.items()}


def answers(node: str) -> bool:
    """Whether a node is there. Ray itself knows only after it has missed several heartbeats."""
    for entry in ray.nodes():
        if entry["NodeID"] == node and entry["Alive"]:
            with suppress(OSError):
                socket.create_connection((entry["NodeManagerAddress"], entry["NodeManagerPort"]), _ANSWER_SECONDS).close()
                return True
    return False


def room(bundle: Bundle, own: Mapping[str, int]) -> int:
    """How many workers the cluster could hold now, besides what others use; `own` is how many of ours each node holds."""
    leaving = leaving_nodes()
    free = state.available_resources_per_node()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    places = 0
    for node in alive - leaving.keys():
        fitting = [int(free.get(node, {}).get(name, 0.0) / amount + 1e-6) for name, amount in bundle.items()]
        places += min(fitting) + own.get(node, 0)
    return places
