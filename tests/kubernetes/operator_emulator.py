"""What KubeRay's operator does with a RayJob, for the small API server: a real Ray cluster, and the job really handed in.

Followed is its life as of version 1.7.0: Initializing, Running, then Complete or Failed; Retrying with another cluster while
`backoffLimit` allows; a deadline for each try, which is not tried again; Suspended and resumed. Pods are processes here: one
Ray head without CPUs and one node for each worker, started and ended as a pod's are, the command's own last words included,
and one that hands the entrypoint in by the same shell script and commands of Ray's as the operator's submitter.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from tests.kubernetes.api_server import NAMESPACE, ApiServer

_LOOK_SECONDS = 0.2
_CLUSTER = Path(__file__).parents[1] / "faults" / "cluster_process.py"


@dataclass
class RayCluster:
    """One Ray cluster with its job server."""

    folder: Path
    environment: Mapping[str, str]
    process: subprocess.Popen[str]
    address: str
    """Of the job server."""

    def entrypoint(self) -> psutil.Process:
        """The command, as Ray's job server runs it."""
        found = [
            each
            for each in psutil.Process(self.process.pid).children(recursive=True)
            if each.cmdline()[1:2] == ["launch/run.py"]
        ]
        assert len(found) == 1, found
        return found[0]

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


@contextmanager
def ray_cluster(project: Path, home: Path, workers: int, variables: Mapping[str, str]) -> Iterator[RayCluster]:
    """Pods begin in the project's folder, as `workingDir` has it, and have the manifest's variables."""
    token = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="pods-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        (Path(temporary) / "ray").mkdir()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WANDB_", "HF_"))}
        environment = kept | {
            "HOME": str(home),
            "RAY_TMPDIR": temporary,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "160",
            **variables,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        environment.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "torch_extensions"))
        process = subprocess.Popen(
            [sys.executable, str(_CLUSTER), "jobs"],
            cwd=project,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(home / "cluster.log").open("a"),
            text=True,
        )
        assert process.stdin
        assert process.stdout
        lines = (line.strip() for line in process.stdout)
        address = next(line.removeprefix("jobs ") for line in lines if line.startswith("jobs "))
        cluster = RayCluster(Path(temporary), environment, process, address)
        try:
            for _ in range(workers):
                process.stdin.write("add\n")
                process.stdin.flush()
                next(line for line in lines if line.startswith("127."))
            yield cluster
        finally:
            cluster.close()


class Submitter(threading.Thread):
    """The pods that hand a job in and follow its log. Another is tried when one fails, and finds what the first has done."""

    def __init__(self, server: ApiServer, name: str, spec: Mapping[str, Any], cluster: RayCluster, submission: str) -> None:
        super().__init__(daemon=True)
        self._server, self._job, self._cluster = server, name, cluster
        self._labels = spec["submitterPodTemplate"]["metadata"]["labels"]
        self._tries = 1 + spec["submitterConfig"]["backoffLimit"]
        self._script = _submitter_script(spec, cluster.address, submission)
        self._process: subprocess.Popen[str] | None = None
        self._is_closed = False

    def run(self) -> None:
        for _ in range(self._tries):
            pod = f"{self._job}-{uuid.uuid4().hex[:5]}"
            self._server.add_pod(pod, {**self._labels, "job-name": self._job})
            self._process = subprocess.Popen(
                ["bash", "-c", self._script],
                env=self._cluster.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            assert self._process.stdout
            for line in self._process.stdout:
                self._server.logs[pod].append(line.rstrip("\n"))
            failed = self._process.wait() != 0
            self._server.end_pod(pod, "Failed" if failed else "Succeeded")
            if not failed or self._is_closed:
                return

    def close(self) -> None:
        """The pod is deleted, and the session of its shell with it."""
        self._is_closed = True
        if self._process and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self.join(10)


@dataclass
class Operator:
    """Looks after all RayJobs of an API server."""

    server: ApiServer
    project: Path
    home: Path
    clusters: dict[str, RayCluster] = field(default_factory=dict)
    """By RayJob, while there is one."""
    threads: dict[str, threading.Thread] = field(default_factory=dict)
    stopping: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self.stopping.wait(_LOOK_SECONDS):
            for job in self.server.of_kind("rayjobs"):
                uid, status = job["metadata"]["uid"], job.get("status", {})
                is_new = not status or (status.get("jobDeploymentStatus") == "Suspended" and not job["spec"].get("suspend"))
                if is_new and not (uid in self.threads and self.threads[uid].is_alive()):
                    self.threads[uid] = threading.Thread(target=self._live, args=(job["metadata"]["name"],), daemon=True)
                    self.threads[uid].start()

    def close(self) -> None:
        self.stopping.set()
        for thread in self.threads.values():
            thread.join(60)

    def _live(self, name: str) -> None:
        try:
            self._try_until_it_has_ended(name)
        except Exception:
            # The test waits for what the operator writes.
            self._set(name, jobDeploymentStatus="Failed", reason="the emulator failed", message=traceback.format_exc())
            raise

    def _try_until_it_has_ended(self, name: str) -> None:
        failed = 0
        while True:
            outcome, message = self._try(name)
            match outcome:
                case "gone":
                    return
                case "SUCCEEDED":
                    return self._set(name, jobDeploymentStatus="Complete", jobStatus=outcome, message=message)
                case "DeadlineExceeded":
                    return self._set(name, jobDeploymentStatus="Failed", reason=outcome, message=message)
                case "Suspended":
                    return self._set(name, jobDeploymentStatus="Suspended", jobStatus="", message="")
            failed += 1
            if failed > self._spec(name).get("backoffLimit", 0):
                fields = {"jobStatus": "FAILED", "reason": "AppFailed", "message": message, "failed": failed}
                return self._set(name, jobDeploymentStatus="Failed", **fields)
            self._set(name, jobDeploymentStatus="Retrying", jobStatus="", message=message, failed=failed)

    def _try(self, name: str) -> tuple[str, str]:
        """One cluster and one submission: how it ended, and what Ray says of that."""
        spec, started = self._spec(name), time.monotonic()
        self._set(name, jobDeploymentStatus="Initializing", jobStatus="", reason="")
        workers = sum(group.get("replicas", 0) for group in spec["rayClusterSpec"]["workerGroupSpecs"])
        (head,) = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
        variables = {entry["name"]: entry["value"] for entry in head["env"] if "value" in entry}
        with ray_cluster(self.project, self.home, workers, variables) as cluster:
            self.clusters[name] = cluster
            headers = {"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"}
            client = JobSubmissionClient(cluster.address, headers=headers)
            submission = f"{name}-{uuid.uuid4().hex[:5]}"
            self._set(name, jobDeploymentStatus="Running", jobStatus="PENDING", jobId=submission)
            submitter = Submitter(self.server, name, spec, cluster, submission)
            submitter.start()
            try:
                outcome, message = self._watch(name, client, submission, started)
                if outcome in JobStatus.__members__:
                    # It ends by itself, once it has read the log to its end.
                    submitter.join(60)
                return outcome, message
            finally:
                submitter.close()
                del self.clusters[name]

    def _watch(self, name: str, client: JobSubmissionClient, submission: str, started: float) -> tuple[str, str]:
        while True:
            time.sleep(_LOOK_SECONDS)
            info = self._look(client, submission)
            if info:
                self._set(name, jobStatus=info.status.value)
            found = self.server.objects.get(("rayjobs", NAMESPACE, name))
            if found is None or self.stopping.is_set():
                self._end_pods(name, client, submission)
                return "gone", ""
            if info and info.status in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED):
                return info.status.value, info.message or ""
            if found["spec"].get("suspend"):
                self._end_pods(name, client, submission)
                return "Suspended", ""
            if time.monotonic() - started > found["spec"].get("activeDeadlineSeconds", float("inf")):
                self._end_pods(name, client, submission)
                return "DeadlineExceeded", "The RayJob has passed the activeDeadlineSeconds."

    def _look(self, client: JobSubmissionClient, submission: str) -> JobDetails | None:
        # Until the submitter has handed it in, the server knows of no such job.
        with suppress(RuntimeError):
            return client.get_job_info(submission)
        return None

    def _end_pods(self, name: str, client: JobSubmissionClient, submission: str) -> None:
        """Ray's job server is asked to stop the command, and so is the head's container, by its last act: twice SIGTERM."""
        with suppress(AssertionError, psutil.Error):
            command = self.clusters[name].entrypoint()
            client.stop_job(submission)
            command.send_signal(signal.SIGTERM)
            command.wait(60)

    def _spec(self, name: str) -> dict[str, Any]:
        return self.server.objects["rayjobs", NAMESPACE, name]["spec"]

    def _set(self, name: str, **fields: Any) -> None:
        # It may have been deleted.
        with suppress(KeyError):
            self.server.set_status(name, **fields)


def _submitter_script(spec: Mapping[str, Any], address: str, submission: str) -> str:
    """The entrypoint stands in it as it is, so the shell takes its quotes away, and what else means something to it."""
    where, environment = f"--address {address}", yaml.safe_load(spec.get("runtimeEnvYAML") or "{}")
    # A Go string in double quotes, as in the operator.
    settings = f"--no-wait --runtime-env-json {json.dumps(json.dumps(environment))} --submission-id {submission}"
    return (
        f"until ray job list {where} >/dev/null 2>&1 ; do sleep 1 ; done ; "
        f"if ! ray job status {where} {submission} >/dev/null 2>&1 ; "
        f"then ray job submit {where} {settings} -- {spec['entrypoint'].strip()} ; fi ; "
        f"ray job logs {where} --follow {submission}"
    )


@contextmanager
def operating(server: ApiServer, project: Path, home: Path) -> Iterator[Operator]:
    """The operator for the length of a `with`; no Ray of its is left then."""
    operator = Operator(server, project, home)
    thread = threading.Thread(target=operator.run, daemon=True)
    thread.start()
    try:
        yield operator
    finally:
        operator.close()
        thread.join(10)
