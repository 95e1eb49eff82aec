"""What the nodes of the cluster can give now. Nodes that are about to leave give nothing."""

import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from typing import Any, TypeVar

import ray
from ray._private.state import state
from ray.util.client import ray as client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster.capacity import Resources, is_selected, number_that_fit

Answer = TypeVar("Answer")
_ANSWER_SECONDS = 2.0
_HEAD = "node:__internal_head__"
"""A resource that the head alone has."""


def _asked_there(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """A driver at ray:// is no node and sees no state of the cluster, so a task on the head looks in its place."""

    @wraps(function)
    def asked(*arguments: Any) -> Answer:
        if not client.is_connected():
            return function(*arguments)
        (head,) = (node["NodeID"] for node in ray.nodes() if node["Alive"] and _HEAD in node["Resources"])
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(head, soft=False)}
        # There it is called by its name, in a worker, which is no client.
        return ray.get(ray.remote(**options)(asked).remote(*arguments))

    return asked


@_asked_there
def leaving_nodes() -> dict[str, float]:
    """Nodes that will be taken away (preemption, drain), and in how many seconds; infinity where nobody said."""
    deadlines = state.get_draining_nodes()
    now = time.time()
    return {node: deadline / 1000 - now if deadline else float("inf") for node, deadline in deadlines.items()}


@_asked_there
def answers(node: str) -> bool:
    """Whether a node is there. Ray itself knows only after it has missed several heartbeats."""
    for entry in ray.nodes():
        if entry["NodeID"] == node and entry["Alive"]:
            with suppress(OSError):
                socket.create_connection((entry["NodeManagerAddress"], entry["NodeManagerPort"]), _ANSWER_SECONDS).close()
                return True
    return False


@_asked_there
def room(bundle: Resources, labels: Mapping[str, str], own: Mapping[str, int]) -> int:
    """How many workers the cluster could hold now, besides what others use.

    `labels` is what a worker's node must be labelled; `own` is how many of ours each node holds.
    """
    leaving = leaving_nodes()
    free = state.available_resources_per_node()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"] and is_selected(node["Labels"], labels)}
    return sum(number_that_fit(bundle, free.get(node, {})) + own.get(node, 0) for node in alive - leaving.keys())
