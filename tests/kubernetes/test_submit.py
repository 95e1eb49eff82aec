"""launch/submit.py against the small API server: handed in once, followed, found again, stopped, listed."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kubernetes.api_server import NAMESPACE, ApiServer
from tests.kubernetes.kubectl import environment, kubectl, submit
from tests.shared_data import ROOT
from tests.unit.rayjob.manifests import manifest_of, planted

WORDS = ("recipe=chinese_llama", "stage=2", "cluster=kubernetes")
NAME = manifest_of(*WORDS)["metadata"]["name"]


def is_within(part: Any, whole: Any) -> bool:
    """Whether all that is said in one stands in the other, which may say more."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(name in whole and is_within(part[name], whole[name]) for name in part)
    if isinstance(part, list):
        return len(part) == len(whole) and all(map(is_within, part, whole))
    return part == whole


def handed_in(server: ApiServer) -> list[str]:
    return [job["metadata"]["name"] for job in server.of_kind("rayjobs")]


def hand_in(kubeconfig: Path, *more: str) -> str:
    completed = submit(*WORDS, "follow=false", *more, kubeconfig=kubeconfig)
    assert completed.returncode == 0, completed.stderr
    return completed.stderr


def test_a_job_is_handed_in_as_it_would_be_rendered(server: ApiServer, kubeconfig: Path) -> None:
    assert f"handed in as {NAME} in namespace {NAMESPACE}" in hand_in(kubeconfig)
    (job,) = server.of_kind("rayjobs")
    rendered = yaml.safe_load(submit(*WORDS, "action=render", kubeconfig=kubeconfig).stdout)
    assert is_within(rendered, job)
    assert not is_within(planted(rendered, "spec.backoffLimit", 99), job)
    tried = [path for method, path in server.requests if method == "POST"]
    assert ["dryRun=All" in path for path in tried] == [True, False]
    assert all("fieldValidation=Strict" in path for path in tried)


def test_the_same_pipeline_is_found_however_it_is_to_be_computed(server: ApiServer, kubeconfig: Path) -> None:
    hand_in(kubeconfig)
    said = hand_in(kubeconfig, "zero=3", "cluster.nodes=4")
    assert f"the same pipeline is there already, as {NAME} since " in said
    assert handed_in(server) == [NAME]
    hand_in(kubeconfig, "seed=2")
    assert len(handed_in(server)) == 2


def test_after_one_that_has_ended_another_is_handed_in(server: ApiServer, kubeconfig: Path) -> None:
    hand_in(kubeconfig)
    server.set_status(NAME, jobDeploymentStatus="Failed", jobStatus="FAILED")
    assert f"handed in as {NAME}-2 " in hand_in(kubeconfig)
    server.set_status(f"{NAME}-2", jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    assert f"handed in as {NAME}-3 " in hand_in(kubeconfig)
    assert handed_in(server) == [NAME, f"{NAME}-2", f"{NAME}-3"]


def test_one_that_is_being_stopped_is_not_taken_for_one_that_runs(server: ApiServer, kubeconfig: Path) -> None:
    """It stays until its pods have used their grace."""
    hand_in(kubeconfig)
    server.objects["rayjobs", NAMESPACE, NAME]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert "being stopped" in submit(*WORDS, "action=status", kubeconfig=kubeconfig).stdout
    assert f"handed in as {NAME}-2 " in hand_in(kubeconfig)


def test_a_name_that_somebody_else_has_is_passed_over(server: ApiServer, kubeconfig: Path) -> None:
    other = {"metadata": {"name": NAME, "namespace": NAMESPACE}, "status": {"jobDeploymentStatus": "Complete"}}
    server.objects["rayjobs", NAMESPACE, NAME] = other
    assert f"handed in as {NAME}-2 " in hand_in(kubeconfig)


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, 0),
        (
            {
                "jobDeploymentStatus": "Failed",
                "jobStatus": "FAILED",
                "reason": "AppFailed",
                "message": "Job entrypoint command failed with exit code 2, last available logs: …",
            },
            2,
        ),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "message": "too late"}, 1),
    ],
    ids=["succeeded", "failed", "too late"],
)
def test_it_is_followed_to_its_end_with_its_log_and_its_exit_code(
    server: ApiServer, kubeconfig: Path, ending: dict[str, str], code: int
) -> None:
    def operate() -> None:
        while not handed_in(server):
            time.sleep(0.02)
        server.set_status(NAME, jobDeploymentStatus="Initializing")
        time.sleep(1)
        server.add_pod(f"{NAME}-abcde", {"job-name": NAME})
        server.logs[f"{NAME}-abcde"].append("chinese_llama 语言")
        server.set_status(NAME, jobDeploymentStatus="Running", jobStatus="RUNNING")
        time.sleep(3)
        server.logs[f"{NAME}-abcde"].append("results")
        server.end_pod(f"{NAME}-abcde")
        server.set_status(NAME, **ending)

    operator = threading.Thread(target=operate, daemon=True)
    operator.start()
    completed = submit(*WORDS, kubeconfig=kubeconfig)
    operator.join(30)
    assert completed.returncode == code, completed.stderr
    assert completed.stdout == "chinese_llama 语言\nresults\n"
    assert f"{NAME}: Running, running" in completed.stderr
    assert ending.get("message", "") in completed.stderr
    assert (f"{NAME} failed" in completed.stderr) == bool(code)


def test_ctrl_c_stops_following_and_not_the_job(server: ApiServer, kubeconfig: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), *WORDS]
    with subprocess.Popen(command, env=environment(kubeconfig), stderr=subprocess.PIPE, text=True) as process:
        while not handed_in(server):
            time.sleep(0.02)
        time.sleep(0.5)
        process.send_signal(2)
        assert process.wait(20) == 130
        assert process.stderr
        assert "the job goes on" in process.stderr.read()
    assert handed_in(server) == [NAME]


def test_status_logs_list_and_stop(server: ApiServer, kubeconfig: Path) -> None:
    hand_in(kubeconfig)
    hand_in(kubeconfig, "seed=2")
    server.set_status(NAME, jobDeploymentStatus="Retrying", failed=2, message="the head was lost")
    server.add_pod(f"{NAME}-abcde", {"job-name": NAME}, phase="Failed")
    server.logs[f"{NAME}-abcde"] += ["one", "two"]
    status = submit(*WORDS, "action=status", kubeconfig=kubeconfig)
    assert status.stdout.splitlines() == [f"{NAME}: Retrying, 2 failed tries", "the head was lost"]
    logs = submit(*WORDS, "action=logs", "follow=false", kubeconfig=kubeconfig)
    assert logs.stdout == "one\ntwo\n"
    listed = submit(*WORDS, "action=list", kubeconfig=kubeconfig).stdout.splitlines()
    assert len(listed) == 3
    assert [line.split()[:3] for line in listed[1:]] == [[name, "chinese_llama", "2"] for name in handed_in(server)]
    stopped = submit(*WORDS, "action=stop", kubeconfig=kubeconfig)
    assert f"{NAME} is being stopped" in stopped.stdout
    assert NAME not in handed_in(server)
    again = submit(*WORDS, "action=status", kubeconfig=kubeconfig)
    assert again.returncode == 2
    assert "this pipeline was not handed in there" in again.stderr


def test_a_rendered_file_is_not_written_over(server: ApiServer, kubeconfig: Path, tmp_path: Path) -> None:
    words = (*WORDS, "action=render", f"output={tmp_path / 'job.yaml'}")
    assert submit(*words, kubeconfig=kubeconfig).returncode == 0
    first = (tmp_path / "job.yaml").read_bytes()
    second = submit(*words, "seed=2", kubeconfig=kubeconfig)
    assert second.returncode == 2
    assert "is there already" in second.stderr
    assert (tmp_path / "job.yaml").read_bytes() == first
    assert kubectl("create", "-f", str(tmp_path / "job.yaml"), kubeconfig=kubeconfig).returncode == 0
    assert handed_in(server) == [NAME]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage=2"], "cluster: local is not Kubernetes"),
        ([*WORDS, "action=rendr"], "action: 'rendr' is none of submit, render, status, logs, stop, list"),
        ([*WORDS, "output=job.yaml"], "output: is for action=render"),
        ([*WORDS, "stge=3"], "stge: no such key; did you mean stage?"),
        ([*WORDS, "text=../corpus"], "text: ../corpus is a path of this machine"),
        ([*WORDS, "workers=64"], "workers: 64 of {'CPU': 1, 'GPU': 1} are more than this cluster can give: 1"),
        ([*WORDS, "workers=3", "cluster.nodes=4"], "is not divisible by micro_batch_size"),
        ([*WORDS, "cluster.gpus_per_node=0", "precision=fp16"], "precision: fp16 trains on GPUs only"),
        ([*WORDS, "text=https://me:secret@host/x.jsonl"], "text: a URL in it carries a password"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_ends_before_anything_is_asked(
    server: ApiServer, kubeconfig: Path, words: list[str], message: str
) -> None:
    completed = submit(*words, kubeconfig=kubeconfig)
    assert completed.returncode == 2
    assert message in completed.stderr
    assert "Traceback" not in completed.stderr
    assert "secret" not in completed.stderr
    assert not [path for method, path in server.requests if method == "POST"]


def test_where_there_is_no_cluster_the_remedy_is_named(tmp_path: Path) -> None:
    completed = submit(*WORDS, kubeconfig=tmp_path / "none")
    assert completed.returncode == 2
    assert "cluster.context: no cluster is configured here" in completed.stderr
    assert "action=render" in completed.stderr
