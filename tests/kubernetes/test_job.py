"""What a RayJob runs is really run: its own entrypoint and environment, by Ray's job server, as the operator would."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.plan.checkpoints import checkpoint_steps
from orchestrator.tracking import read_metrics
from orchestrator.tracking.ledger import read_ledger
from tests.faults.running import SAVE_EVERY, STEPS, Undisturbed
from tests.kubernetes.api_server import NAMESPACE, ApiServer
from tests.kubernetes.kubectl import kubectl, submit
from tests.kubernetes.operator_emulator import Operator, operating
from tests.shared_data import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def home(folder: Path) -> Path:
    """What the claim holds: the stage before, done."""
    return folder


@pytest.fixture
def operator(server: ApiServer, home: Path) -> Iterator[Operator]:
    with operating(server, ROOT, home) as found:
        yield found


@pytest.fixture
def words(home: Path) -> list[str]:
    """The small stage, on two pods without GPUs; the claim is a folder here."""
    return [
        "recipe=chinese_llama",
        "stage=1",
        "tracking=none",
        "cluster=kubernetes",
        f"cluster.project_folder={ROOT}",
        f"cluster.volumes.runs.path={home / 'runs'}",
        f"run_root={home / 'runs'}",
        "cluster.nodes=2",
        "cluster.gpus_per_node=0",
        "cluster.cpus_per_node=1",
        "cluster.memory_per_node=4Gi",
        "cluster.shared_memory=1Gi",
        f"stages.embeddings.steps={STEPS}",
        f"checkpoint.every_steps={SAVE_EVERY}",
    ]


class Stage:
    """The stage's folder on the claim."""

    def __init__(self, home: Path) -> None:
        self._runs = home / "runs"

    @property
    def folder(self) -> Path:
        (found,) = self._runs.glob("embeddings-*")
        return found

    def has_checkpoint(self) -> bool:
        return any(checkpoint_steps(folder) for folder in self._runs.glob("embeddings-*"))

    def events(self, kind: str) -> list[dict]:
        return [event for event in read_ledger(self.folder / "ledger.jsonl") if event["event"] == kind]

    def losses(self) -> list[tuple[int, float]]:
        return [(row["step"], row["loss"]) for row in read_metrics(self.folder / "metrics.jsonl")]


def wait_until(condition: Callable[[], object], seconds: float = 150) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "too late"
        time.sleep(0.05)


def status(server: ApiServer) -> dict:
    (job,) = server.of_kind("rayjobs")
    return job.get("status", {})


def test_a_job_is_killed_halfway_tried_again_and_resumes_with_nothing_lost(
    server: ApiServer, operator: Operator, kubeconfig: Path, home: Path, words: list[str], undisturbed: Undisturbed
) -> None:
    stage = Stage(home)
    handed_in = submit(*words, "follow=false", kubeconfig=kubeconfig)
    assert handed_in.returncode == 0, handed_in.stderr
    (name,) = (job["metadata"]["name"] for job in server.of_kind("rayjobs"))
    wait_until(stage.has_checkpoint)
    operator.clusters[name].entrypoint().kill()
    # The second try is followed to its end, by the command that would have handed it in.
    followed = submit(*words, kubeconfig=kubeconfig)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert f"the same pipeline is there already, as {name}" in followed.stderr
    assert "1 failed try" in followed.stderr
    assert "goes on from step" in followed.stdout
    assert f"step {STEPS}/{STEPS}" in followed.stdout
    assert status(server)["jobStatus"] == "SUCCEEDED"
    assert len(stage.events("begin")) == 2
    assert stage.events("resumed")[0]["step"] >= SAVE_EVERY
    assert stage.losses() == undisturbed.losses
    record = json.loads((stage.folder / "record.json").read_text(encoding="utf-8"))
    assert record["files"]["adapter/adapter_model.safetensors"] == undisturbed.adapter


def test_a_suspended_job_saves_and_goes_on_and_a_late_one_is_not_tried_again(
    server: ApiServer, operator: Operator, kubeconfig: Path, home: Path, words: list[str], undisturbed: Undisturbed
) -> None:
    stage = Stage(home)
    submit(*words, "follow=false", kubeconfig=kubeconfig)
    (name,) = (job["metadata"]["name"] for job in server.of_kind("rayjobs"))
    wait_until(stage.has_checkpoint)
    patch = ("patch", "rayjob", name, "--namespace", NAMESPACE, "--type", "merge", "--patch")
    assert kubectl(*patch, '{"spec": {"suspend": true}}', kubeconfig=kubeconfig).returncode == 0
    wait_until(lambda: status(server)["jobDeploymentStatus"] == "Suspended")
    (stop,) = stage.events("stop")
    assert checkpoint_steps(stage.folder)[-1] == stop["step"]
    late = '{"spec": {"suspend": false, "activeDeadlineSeconds": 1}}'
    assert kubectl(*patch, late, kubeconfig=kubeconfig).returncode == 0
    followed = submit(*words, kubeconfig=kubeconfig)
    assert followed.returncode == 1
    assert "DeadlineExceeded" in followed.stderr
    assert status(server).get("failed", 0) == 0
    submit(*words, "follow=false", kubeconfig=kubeconfig)
    wait_until(lambda: len(stage.events("first_step")) == 2)
    # Stopped once more, by whoever handed it in; what it learned until then is saved.
    assert submit(*words, "action=stop", kubeconfig=kubeconfig).returncode == 0
    wait_until(lambda: len(stage.events("stop")) >= 2)
    assert checkpoint_steps(stage.folder)[-1] == stage.events("stop")[-1]["step"]
    again = submit(*words, kubeconfig=kubeconfig)
    assert again.returncode == 0, again.stdout + again.stderr
    assert stage.losses() == undisturbed.losses
