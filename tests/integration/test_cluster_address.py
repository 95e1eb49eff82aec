"""The same recipe on a Ray cluster that is already running."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.supervise import MAY_PASS
from tests.integration.command import run_command

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
    again = run_command([*words, "stages.embeddings.learning_rate=1e-3"], tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr


def test_an_address_where_no_cluster_answers_is_named(tmp_path: Path) -> None:
    completed = run_command(["cluster=address", "cluster.address=127.0.0.1:1"], tmp_path, seconds=120)
    assert completed.returncode == MAY_PASS
    assert "cluster.address: no Ray cluster answers at 127.0.0.1:1" in completed.stderr
    assert "Traceback" not in completed.stderr
