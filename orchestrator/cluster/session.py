"""A Ray cluster for the length of a command: started here, or joined."""

import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.exceptions
from ray._private import ray_constants
from ray.autoscaler.sdk import request_resources

from orchestrator.cluster.capacity import Capacity, Node, declared_capacity
from orchestrator.cluster.code import staged
from orchestrator.cluster.failures import cause_of
from orchestrator.errors import ClusterError, RecipeError
from orchestrator.schema import AddressCluster, Cluster, KubernetesCluster, LocalCluster

Answer = TypeVar("Answer")
_CONNECT_SECONDS = 5.0
_HEAD_LOST_SECONDS = 5
"""A local cluster's head does not come back; Ray itself would wait a minute before the processes end."""
_FOLDERS, _FOLDER_PREFIX = Path("/tmp"), "ray-"
_FOLDER_NAME = re.compile(r"ray-(\d+)-\w{8}")


@contextmanager
def connected(cluster: Cluster) -> Iterator[Capacity]:
    """Ray for the length of a `with`; ClusterError when it cannot be started or joined."""
    match cluster:
        case LocalCluster():
            with _local(cluster) as capacity:
                yield capacity
        case AddressCluster():
            with _joined(cluster) as capacity:
                yield capacity
        case KubernetesCluster():
            with _in_pod(cluster) as capacity:
                yield capacity


def run_task(function: Callable[..., Answer], *arguments: Any, cpus: float = 1, gpus: int = 0) -> Answer:
    """Runs a function once, in a process of the cluster, and gives its answer or raises its error."""
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(function)
    try:
        return ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise cause_of(error) from error
    except ray.exceptions.RayError as error:
        raise ClusterError(f"the process that ran {function.__name__} was lost: {error}") from error


@contextmanager
def _joined(cluster: AddressCluster) -> Iterator[Capacity]:
    # Where the nodes have the code already, sending it would hide that they have another.
    with staged() if cluster.code == "ship" else nullcontext() as folder:
        try:
            _check_reachable(cluster.address)
            ray.init(address=cluster.address, runtime_env={"working_dir": folder} if folder else None, **_QUIET)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise ClusterError(
                f"cluster.address: no Ray cluster answers at {cluster.address}: {error}; `ray start` prints the address, "
                "and a cluster that asks for a token wants the same RAY_AUTH_TOKEN or ~/.ray/auth_token here"
            ) from error
        try:
            yield _capacity()
        finally:
            ray.shutdown()


@contextmanager
def _in_pod(cluster: KubernetesCluster) -> Iterator[Capacity]:
    """Ray as KubeRay has started it; the image has the code."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise RecipeError(
            "cluster: kubernetes runs inside a RayJob; launch/submit.py hands it in, with the same words as launch/run.py"
        )
    try:
        ray.init(address=address, **_QUIET)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise ClusterError(f"cluster: Ray does not answer at {address}: {error}") from error
    try:
        if cluster.grows:
            # The autoscaler adds nodes for what is asked for, and ranks ask only for what is there.
            shape = {"GPU": cluster.gpus_per_node} if cluster.gpus_per_node else {"CPU": cluster.cpus_per_node}
            request_resources(bundles=[shape] * cluster.most_nodes)
        yield declared_capacity(cluster)
    finally:
        if cluster.grows:
            # Or idle nodes would stay until the whole cluster goes.
            request_resources(bundles=[])
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes, and then ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()


_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}


@contextmanager
def _local(cluster: LocalCluster) -> Iterator[Capacity]:
    # A folder of its own keeps other Ray clusters of this machine out of sight. Its name is short, because the
    # sockets in it may have paths of at most 107 characters.
    # Without this Ray listens on the address that other machines reach this one by.
    ray_constants.ENABLE_RAY_CLUSTER = False
    _remove_left_folders()
    folder = tempfile.mkdtemp(prefix=f"{_FOLDER_PREFIX}{os.getpid()}-", dir=_FOLDERS)
    try:
        ray.init(
            address="local",
            num_gpus=cluster.gpus,
            num_cpus=cluster.cpus,
            include_dashboard=False,
            _temp_dir=folder,
            _system_config={"gcs_rpc_server_reconnect_timeout_s": _HEAD_LOST_SECONDS},
            **_QUIET,
        )
        yield _capacity()
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left_folders() -> None:
    """Those of processes that were killed and could not do so themselves."""
    for folder in _FOLDERS.glob(f"{_FOLDER_PREFIX}*"):
        match = _FOLDER_NAME.fullmatch(folder.name)
        # Another command may be removing it, too.
        with suppress(FileNotFoundError):
            if match and not Path("/proc", match[1]).exists() and folder.stat().st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)


def _capacity() -> Capacity:
    return Capacity(tuple(Node(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]))
