"""What a RayJob carries: each option of the cluster where Kubernetes, KubeRay or Ray looks for it."""

import shlex
from typing import Any

import pytest
import yaml

from orchestrator.compose import compose
from orchestrator.errors import RecipeError
from orchestrator.rayjob.build import as_yaml, build_rayjob
from orchestrator.rayjob.check import manifest_problems
from tests.unit.rayjob.manifests import crd, manifest_of, recipe_of

WORDS = ("recipe=chinese_llama", "stage=2", "cluster=kubernetes")


def built(*more: str) -> dict[str, Any]:
    """Of these options; right in every respect, too."""
    manifest = manifest_of(*WORDS, *more)
    assert manifest_problems(manifest, crd()) == []
    return manifest


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["rayClusterSpec"]


def head_pod(manifest: dict[str, Any]) -> dict[str, Any]:
    return cluster_of(manifest)["headGroupSpec"]["template"]["spec"]


def workers(manifest: dict[str, Any]) -> dict[str, Any]:
    (group,) = cluster_of(manifest)["workerGroupSpecs"]
    return group


def worker_pod(manifest: dict[str, Any]) -> dict[str, Any]:
    return workers(manifest)["template"]["spec"]


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod["containers"]
    return found


def test_the_entrypoint_is_the_command_as_it_would_be_typed() -> None:
    words = (*WORDS, "stages.attention.method={kind: lora, targets: [q_proj], rank: 4, alpha: 8}", "cluster.nodes=2")
    entrypoint = manifest_of(*words)["spec"]["entrypoint"]
    assert shlex.split(entrypoint) == ["python", "launch/run.py", *words]
    assert compose(shlex.split(entrypoint)[2:]) == compose(words)


def test_what_is_written_reads_back_as_what_was_built() -> None:
    job = build_rayjob(*recipe_of(*WORDS), WORDS)
    assert yaml.safe_load(as_yaml(job)) == job.as_manifest()


def test_the_head_has_no_work_of_its_own() -> None:
    head = cluster_of(built("cluster.head={cpus: 8, memory: 32Gi}"))["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == head["rayStartParams"]["num-gpus"] == "0"
    assert container(head["template"]["spec"])["resources"]["limits"] == {"cpu": "8", "memory": "32Gi"}


def test_a_worker_requests_what_it_may_take() -> None:
    more = (
        "cluster.gpus_per_node=4",
        "cluster.cpus_per_node=48",
        "cluster.memory_per_node=500Gi",
        "cluster.rdma={rdma/ib: 4}",
    )
    resources = container(worker_pod(built(*more)))["resources"]
    assert resources["limits"] == {"cpu": "48", "memory": "500Gi", "nvidia.com/gpu": "4", "rdma/ib": "4"}
    assert resources["requests"] == resources["limits"]


def test_without_gpus_none_is_asked_for() -> None:
    assert container(worker_pod(built("cluster.gpus_per_node=0")))["resources"]["limits"].keys() == {"cpu", "memory"}


def test_a_number_of_nodes_is_fixed_and_a_range_is_left_to_the_autoscaler() -> None:
    def numbers(manifest: dict[str, Any]) -> list[int]:
        return [workers(manifest)[name] for name in ("minReplicas", "replicas", "maxReplicas")]

    fixed, grows = built("cluster.nodes=3"), built("cluster.nodes=2-8")
    assert numbers(fixed) == [3, 3, 3]
    assert "enableInTreeAutoscaling" not in cluster_of(fixed)
    assert numbers(grows) == [2, 2, 8]
    assert cluster_of(grows)["enableInTreeAutoscaling"] is True
    assert cluster_of(grows)["autoscalerOptions"]["version"] == "v2"
    assert [head_pod(each)["automountServiceAccountToken"] for each in (fixed, grows)] == [False, True]


def test_shared_memory_is_memory_of_its_size() -> None:
    pod = worker_pod(built("cluster.shared_memory=32Gi"))
    assert {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "32Gi"}} in pod["volumes"]
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container(pod)["volumeMounts"]


def test_volumes_are_mounted_on_head_and_workers_where_relative_paths_lead() -> None:
    manifest = built("cluster.volumes.data={claim: corpus, path: /data, read_only: true}", "text=/data/text.jsonl")
    for pod in (head_pod(manifest), worker_pod(manifest)):
        assert {"name": "runs", "persistentVolumeClaim": {"claimName": "orchestrator-runs"}} in pod["volumes"]
        mounts = container(pod)["volumeMounts"]
        assert {"name": "runs", "mountPath": "/opt/orchestrator/runs"} in mounts
        assert {"name": "data", "mountPath": "/data", "readOnly": True} in mounts
        assert container(pod)["workingDir"] == "/opt/orchestrator"


def test_secrets_come_by_reference_and_reach_no_submitter() -> None:
    manifest = built("cluster.secrets.HF_TOKEN={name: hub, key: token}", "cluster.environment.NCCL_DEBUG=WARN")
    for pod in (head_pod(manifest), worker_pod(manifest)):
        assert container(pod)["env"] == [
            {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "290"},
            {"name": "HF_HOME", "value": "/opt/orchestrator/runs/.hub"},
            {"name": "NCCL_DEBUG", "value": "WARN"},
            {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}},
        ]
    assert container(manifest["spec"]["submitterPodTemplate"]["spec"])["env"] == []


def test_what_comes_from_the_hub_is_fetched_where_all_pods_see_it() -> None:
    def hub(*more: str) -> str | None:
        variables = {entry["name"]: entry.get("value") for entry in container(worker_pod(built(*more)))["env"]}
        return variables.get("HF_HOME")

    assert hub() == "/opt/orchestrator/runs/.hub"
    assert hub("cluster.environment.HF_HOME=/data/hub") == "/data/hub"
    assert hub("~cluster.volumes", "run_root=s3://bucket/runs") is None


def test_workers_go_where_they_are_told() -> None:
    more = (
        "cluster.node_selector={pool: gpu}",
        "cluster.tolerations=[{key: nvidia.com/gpu, effect: NoSchedule}]",
        "cluster.topology_key=topology.kubernetes.io/rack",
        "cluster.priority_class=training",
    )
    manifest = built(*more)
    pod = worker_pod(manifest)
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["priorityClassName"] == head_pod(manifest)["priorityClassName"] == "training"
    (wish,) = pod["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert wish["podAffinityTerm"]["topologyKey"] == "topology.kubernetes.io/rack"
    own = workers(manifest)["template"]["metadata"]["labels"].items()
    assert wish["podAffinityTerm"]["labelSelector"]["matchLabels"].items() <= own
    assert "nodeSelector" not in head_pod(manifest)


def test_labels_that_workers_want_are_given_to_their_nodes() -> None:
    assert workers(built("cluster.labels={pool: new}"))["labels"] == {"pool": "new"}


def test_a_queue_is_kueues() -> None:
    manifest = built("cluster.queue=training")
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    assert manifest["spec"]["shutdownAfterJobFinishes"] is True


def test_pods_have_an_ordinary_users_rights() -> None:
    manifest = built("cluster.run_as_user=4321", "cluster.run_as_group=4322")
    for pod in (head_pod(manifest), worker_pod(manifest), manifest["spec"]["submitterPodTemplate"]["spec"]):
        security = pod["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"], security["fsGroup"]) == (True, 4321, 4322)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container(pod)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }


def test_a_pod_is_given_time_and_uses_it() -> None:
    manifest = built("cluster.grace_seconds=600")
    for pod in (head_pod(manifest), worker_pod(manifest)):
        assert pod["terminationGracePeriodSeconds"] == 600
        command = container(pod)["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:3] == ["python", "-m", "orchestrator.cluster.leave"]
        assert 0 < int(command[3]) < 600
        # As long as Ray's job server, which is asked to stop the command at the same time.
        assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": command[3]} in container(pod)["env"]


def test_limits_are_where_the_operator_looks_for_them() -> None:
    more = ("cluster.backoff_limit=7", "cluster.active_deadline_seconds=3600", "cluster.start_deadline_seconds=900")
    spec = built(*more)["spec"]
    assert (spec["backoffLimit"], spec["activeDeadlineSeconds"], spec["preRunningDeadlineSeconds"]) == (7, 3600, 900)


def test_after_the_end_everything_goes_in_one_of_two_ways() -> None:
    spec = built("cluster.cleanup={kind: shutdown, seconds: 30}")["spec"]
    assert (spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"]) == (True, 30)
    rules = built("cluster.cleanup={kind: rules, cluster_seconds: 100, job_seconds: 200}")["spec"]
    assert not rules["shutdownAfterJobFinishes"]
    found = {}
    for rule in rules["deletionStrategy"]["deletionRules"]:
        condition = dict(rule["condition"])
        seconds = condition.pop("ttlSeconds")
        ((status, value),) = condition.items()
        found[status, value, rule["policy"]] = seconds
    # A job that failed for whatever reason, one that never ran among them.
    for ending in (("jobStatus", "SUCCEEDED"), ("jobDeploymentStatus", "Failed")):
        assert found[ending[0], ending[1], "DeleteWorkers"] == 0
        assert found[ending[0], ending[1], "DeleteCluster"] == 100
        assert found[ending[0], ending[1], "DeleteSelf"] == 200
    grows = built("cluster.nodes=1-2", "cluster.cleanup={kind: rules}")["spec"]["deletionStrategy"]["deletionRules"]
    assert "DeleteWorkers" not in {rule["policy"] for rule in grows}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run_root=/elsewhere"], "run_root: /elsewhere lies in no volume of the pods"),
        (["run_root=runs/../other"], "run_root: runs/../other lies in no volume"),
        (["~cluster.volumes"], r"run_root: runs lies in no volume of the pods \(there is none\)"),
        (["text=../corpus"], r"text: \.\./corpus is a path of this machine"),
        (["stages.instruct.data=/mnt/x.json"], r"stages\.instruct\.data: /mnt/x\.json is a path of this machine"),
        (["text=file:///home/me/x.jsonl"], "text: file:///home/me/x.jsonl is a path of this machine"),
        (["cluster.volumes.runs.read_only=true"], "run_root: runs lies in no volume of the pods"),
        (
            ["~cluster.volumes", "run_root=s3://bucket/runs", "base_model=owner/model"],
            "base_model: owner/model comes from the hub to one pod",
        ),
        (["cluster.resources={disk: 1}"], "resources .* none of the pods has"),
        (["cluster.labels={pool: '!old'}"], "labels.pool '!old' is a selector"),
        (["cluster.queue=q", "cluster.nodes=1-4"], "queue and a range of nodes exclude each other"),
        (["base_model=/models/llama"], "base_model: /models/llama is a path of this machine"),
        (["cluster.queue=q", "cluster.cleanup={kind: rules}"], "cluster: queue and cleanup.kind=rules exclude each other"),
        (["cluster.memory_per_node=64GB"], "cluster.memory_per_node: '64GB' is no quantity of Kubernetes"),
        (["cluster.nodes=4-2"], "cluster.nodes: input should be a number above 0, or a range of two such as 2-8"),
        (["cluster.cleanup={kind: rules, cluster_seconds: 9, job_seconds: 8}"], "must not fall"),
        (["cluster.gpu_per_node=8"], "cluster.gpu_per_node: no such key; did you mean gpus_per_node"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_pods_could_not_do_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        manifest_of(*WORDS, *words)


def test_an_object_store_needs_no_volume() -> None:
    manifest = built("~cluster.volumes", "run_root=s3://bucket/runs")
    assert [volume["name"] for volume in worker_pod(manifest)["volumes"]] == ["shared-memory"]
