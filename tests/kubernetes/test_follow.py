"""A job that is followed where the API server, or the way to it, fails now and then; and what its refusals are called."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.errors import ClusterError, OrchestratorError
from orchestrator.rayjob.api import RayJobs
from orchestrator.rayjob.submission import follow, submit
from tests.kubernetes.api_server import NAMESPACE, ApiServer, Refused
from tests.unit.rayjob.manifests import job_of, recipe_of

WORDS = ("recipe=chinese_llama", "stage=2", "cluster=kubernetes")
_KUBECONFIG = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
"""The client reads KUBECONFIG at its import."""
AWAY = Refused(503, "ServiceUnavailable", "the server is starting")


@pytest.fixture
def jobs(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> RayJobs:
    monkeypatch.setattr(_KUBECONFIG, str(kubeconfig))
    return RayJobs(recipe_of(*WORDS)[1])


class Followed:
    """A job that runs and prints, and somebody who follows it in a thread."""

    def __init__(self, server: ApiServer, jobs: RayJobs) -> None:
        self.said: list[str] = []
        self.shown: list[str] = []
        self.name = submit(jobs, job_of(WORDS), self.said.append)
        self.pod = f"{self.name}-abcde"
        self._server, self._jobs = server, jobs
        server.add_pod(self.pod, {"job-name": self.name})
        server.set_status(self.name, jobDeploymentStatus="Running", jobStatus="RUNNING")
        self._thread = threading.Thread(target=follow, args=(jobs, self.name, self.said.append, self.shown.append))
        self._thread.start()

    def prints(self, *lines: str) -> None:
        self._server.logs[self.pod].extend(lines)

    def ends(self) -> None:
        self._server.end_pod(self.pod)
        self._server.set_status(self.name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture
def followed(server: ApiServer, jobs: RayJobs) -> Iterator[Followed]:
    found = Followed(server, jobs)
    yield found
    found.ends()


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_log_whose_connection_is_lost_is_read_on_where_it_ended(server: ApiServer, followed: Followed) -> None:
    server.cut_after = 2
    followed.prints("one", "two", "three")
    wait_until(lambda: server.cut_after is None)
    followed.prints("four")
    wait_until(lambda: len(followed.shown) >= 4)
    followed.ends()
    assert followed.shown == ["one", "two", "three", "four"]
    assert sum("/log?" in path for _, path in server.requests) == 2


def test_a_second_try_is_read_after_the_first(server: ApiServer, followed: Followed) -> None:
    followed.prints("of the first")
    wait_until(lambda: followed.shown == ["of the first"])
    server.end_pod(followed.pod, "Failed")
    server.add_pod(f"{followed.name}-fghij", {"job-name": followed.name})
    server.logs[f"{followed.name}-fghij"].append("of the second")
    wait_until(lambda: followed.shown == ["of the first", "of the second"])
    server.end_pod(f"{followed.name}-fghij")


def test_an_api_server_that_is_away_for_a_while_is_asked_again(server: ApiServer, followed: Followed) -> None:
    followed.prints("before")
    wait_until(lambda: followed.shown == ["before"])
    server.refusing = lambda method, path: AWAY
    wait_until(lambda: any("asking again" in line for line in followed.said))
    server.refusing = lambda method, path: None
    followed.prints("after")
    wait_until(lambda: followed.shown == ["before", "after"])
    assert f"{followed.name}: cluster: the API server failed to get RayJobs in namespace {NAMESPACE} (503 " in "".join(
        followed.said
    )


def test_patience_with_it_ends(server: ApiServer, jobs: RayJobs) -> None:
    name, said = submit(jobs, job_of(WORDS), print), []
    server.refusing = lambda method, path: AWAY
    with pytest.raises(ClusterError, match=r"503 the server is starting"):
        follow(jobs, name, said.append, print, patience_seconds=0.5)
    assert len(said) >= 1


def test_a_job_that_is_deleted_is_not_waited_for(server: ApiServer, jobs: RayJobs) -> None:
    name = submit(jobs, job_of(WORDS), print)
    jobs.delete(name)
    assert server.of_kind("rayjobs") == []
    with pytest.raises(ClusterError, match=f"the RayJob {name} was deleted; the same command hands it in again"):
        follow(jobs, name, print, print)


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        (Refused(403, "Forbidden", "rayjobs is forbidden"), "you may not create RayJobs in namespace orchestrator"),
        (Refused(401, "Unauthorized", "Unauthorized"), "you may not create RayJobs"),
        (Refused(404, "NotFound", "the server could not find the requested resource"), "install KubeRay 1.7 or later"),
        (
            Refused(500, "InternalError", "etcd is full"),
            "failed to create RayJobs in namespace orchestrator (500 etcd is full)",
        ),
        (Refused(422, "Invalid", "denied by a policy"), "the API server refuses the RayJob: denied by a policy"),
    ],
    ids=lambda value: str(value.status["code"]) if isinstance(value, Refused) else "",
)
def test_a_refusal_is_called_by_its_name_and_its_remedy(
    server: ApiServer, jobs: RayJobs, refused: Refused, said: str
) -> None:
    server.refusing = lambda method, path: refused if method == "POST" else None
    with pytest.raises(OrchestratorError) as caught:
        submit(jobs, job_of(WORDS), print)
    assert said in str(caught.value)
    assert server.of_kind("rayjobs") == []


def test_a_namespace_that_is_not_there_is_named(bare_server: ApiServer, jobs: RayJobs) -> None:
    with pytest.raises(
        ClusterError, match=r'cluster.namespace: namespaces "orchestrator" not found; kubectl apply -k k8s/base'
    ):
        submit(jobs, job_of(WORDS), print)
    assert bare_server.of_kind("rayjobs") == []


def test_a_job_that_is_gone_is_told_from_a_cluster_that_knows_none(server: ApiServer, jobs: RayJobs) -> None:
    assert server.url
    assert jobs.named("never") is None
    with pytest.raises(ClusterError, match=r'"never" not found; it is gone, or was never there'):
        jobs.delete("never")


def test_where_nobody_answers_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kubeconfig = ApiServer({}, url="http://127.0.0.1:1").kubeconfig(tmp_path / "kubeconfig")
    monkeypatch.setattr(_KUBECONFIG, str(kubeconfig))
    with pytest.raises(ClusterError, match="the API server does not answer"):
        RayJobs(recipe_of(*WORDS)[1]).ours()
