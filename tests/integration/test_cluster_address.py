"""The same recipe on a Ray cluster that is already running."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.supervise import MAY_PASS
from orchestrator.tracking.ledger import read_ledger
from tests.faults.nodes import cluster_of
from tests.integration.command import command_environment, run_command

pytestmark = [pytest.mark.ray, pytest.mark.slow]

_HEAD = """
import sys, ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1])
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A cluster of its own, which ends with the process that holds it; its token lies in the home that the command has."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        head = subprocess.Popen(
            [sys.executable, "-c", _HEAD, folder],
            env=os.environ | {"HOME": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert head.stdin
        assert head.stdout
        try:
            lines = iter(head.stdout.readline, "")
            yield next(line.strip() for line in lines if line.strip().rpartition(":")[2].isdecimal())
        finally:
            head.stdin.close()
            head.wait(timeout=60)


def test_a_stage_trains_on_a_cluster_that_is_already_running_and_leaves_it_running(address: str, tmp_path: Path) -> None:
    there = ["cluster=address", f"cluster.address={address}"]
    words = ["stage=1", "stages.embeddings.steps=2", "tracking=none", "workers=2", *there]
    completed = run_command(words, tmp_path)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert len(list(tmp_path.glob("runs/embeddings-*/adapter/adapter_model.safetensors"))) == 1
    look = f"import orchestrator.cluster, ray; ray.init({address!r}, log_to_driver=False); print(ray.available_resources())"
    still = subprocess.run(
        [sys.executable, "-c", look],
        env=command_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "'CPU': 2.0" in still.stdout, "nothing of ours is left there"


def test_a_machine_that_is_no_node_of_the_cluster_trains_there_through_rays_client(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with cluster_of(tmp_path, 2, client_port=port):
        there = ["cluster=address", f"cluster.address=ray://127.0.0.1:{port}", "cluster.placement=spread"]
        words = ["stage=1", "stages.embeddings.steps=2", "tracking=none", "workers=2", *there]
        completed = run_command(words, tmp_path)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    (stage,) = tmp_path.glob("runs/embeddings-*")
    (attempt,) = [event for event in read_ledger(stage / "ledger.jsonl") if event["event"] == "attempt"]
    assert attempt["nodes"] == ["127.0.0.2", "127.0.0.3"]


def test_an_address_where_no_cluster_answers_is_named(tmp_path: Path) -> None:
    completed = run_command(["cluster=address", "cluster.address=127.0.0.1:1"], tmp_path, seconds=120)
    assert completed.returncode == MAY_PASS
    assert "cluster.address: no Ray cluster answers at 127.0.0.1:1" in completed.stderr
    assert "Traceback" not in completed.stderr


_ASKED = """
import orchestrator.cluster, json, sys
from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL as CHANNEL
from ray.experimental.internal_kv import _internal_kv_get
import ray
from orchestrator.cluster.session import connected
from orchestrator.schema import KubernetesCluster
with connected(KubernetesCluster.model_validate({"kind": "kubernetes", "image": "image", "nodes": json.loads(sys.argv[1])})):
    during = _internal_kv_get(CHANNEL)
ray.init(address=sys.argv[2], log_to_driver=False)
print("asked", during.decode() if during else None, "then", (_internal_kv_get(CHANNEL) or b"null").decode())
"""


def test_nodes_of_a_range_are_asked_for_while_the_command_runs_and_no_longer(address: str, tmp_path: Path) -> None:
    """Ray's autoscaler adds nodes for what is asked for, and takes idle ones away."""

    def asked(nodes: str) -> str:
        command = [sys.executable, "-c", _ASKED, nodes, address]
        environment = command_environment(tmp_path) | {"RAY_ADDRESS": address}
        completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert completed.returncode == 0, completed.stderr
        return next(line for line in completed.stdout.splitlines() if line.startswith("asked"))

    assert asked("2") == "asked None then null"
    assert asked('"1-3"').count('"GPU": 1') == 3
    assert asked('"1-3"').endswith("then []")
