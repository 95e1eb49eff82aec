"""Mistakes planted in a manifest that was right: each is refused by a message that names its field."""

from typing import Any

import pytest

from orchestrator.rayjob.check import manifest_problems
from orchestrator.rayjob.crd import read_schema, schema_problems
from tests.unit.rayjob.manifests import MISSING, crd, manifest_of, planted

_CLUSTER = "spec.rayClusterSpec"
_HEAD, _WORKERS = f"{_CLUSTER}.headGroupSpec", f"{_CLUSTER}.workerGroupSpecs.0"
_HEAD_POD, _WORKER_POD = f"{_HEAD}.template.spec", f"{_WORKERS}.template.spec"
_RAY = f"{_WORKER_POD}.containers.0"

SCHEMA = {
    "a mistyped field": ("spec.backofLimit", 3, "spec.backofLimit"),
    "a field in the wrong place": (f"{_CLUSTER}.replicas", 2, f"{_CLUSTER}.replicas"),
    "a mistyped field of a pod": (f"{_RAY}.volumeMount", [], f"{_WORKER_POD}.containers[0].volumeMount"),
    "a text for a number": (f"{_WORKERS}.replicas", "two", f"{_WORKERS}.replicas"),
    "a number for a text": (f"{_HEAD}.rayStartParams.num-cpus", 0, f"{_HEAD}.rayStartParams.num-cpus"),
    "a group without a name": (f"{_WORKERS}.groupName", MISSING, f"{_WORKERS}.groupName"),
    "a cluster without a head": (_HEAD, MISSING, _HEAD),
    "a number in a variable": (f"{_RAY}.env", [{"name": "A", "value": 1}], f"{_WORKER_POD}.containers[0].env[0].value"),
    "a container without a name": (f"{_RAY}.name", MISSING, f"{_WORKER_POD}.containers[0].name"),
    "an environment as a mapping": ("spec.runtimeEnvYAML", {"env_vars": {}}, "spec.runtimeEnvYAML"),
    "an unknown condition": (
        "spec.deletionStrategy.deletionRules",
        [{"policy": "DeleteSelf", "condition": {"jobStatus": "DONE"}}],
        "spec.deletionStrategy.deletionRules[0].condition.jobStatus",
    ),
    "a quantity with a typo": (
        f"{_RAY}.resources.limits.memory",
        "64 GB",
        f"{_WORKER_POD}.containers[0].resources.limits.memory",
    ),
    "no deadline at all": ("spec.preRunningDeadlineSeconds", 0, "spec.preRunningDeadlineSeconds"),
    "an unknown way to ask for a token": (f"{_CLUSTER}.authOptions.mode", "tokens", f"{_CLUSTER}.authOptions.mode"),
}
"""By what is wrong: the path, the value, and the field that must be named. The CRD's schema knows of these."""

OPERATOR = {
    "a long name": ("metadata.name", "a" * 48, "metadata.name"),
    "a name that begins with a digit": ("metadata.name", "7b-model", "metadata.name"),
    "a name in capitals": ("metadata.name", "Chinese-LLaMA", "metadata.name"),
    "time to live without shutdown": (
        "spec.shutdownAfterJobFinishes",
        False,
        "spec.ttlSecondsAfterFinished",
    ),
    "a negative time to live": ("spec.ttlSecondsAfterFinished", -1, "spec.ttlSecondsAfterFinished"),
    "rules and shutdown": (
        "spec.deletionStrategy.deletionRules",
        [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "ttlSeconds": 1}}],
        "spec.deletionStrategy.deletionRules",
    ),
    "two conditions in one": (
        "spec.deletionStrategy.deletionRules",
        [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"}}],
        "spec.deletionStrategy.deletionRules[0].condition",
    ),
    "the job before its cluster": (
        "spec.deletionStrategy.deletionRules",
        [
            {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 100}},
            {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "ttlSeconds": 10}},
        ],
        "spec.deletionStrategy.deletionRules",
    ),
    "the same rule twice": (
        "spec.deletionStrategy.deletionRules",
        [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "ttlSeconds": 1}}] * 2,
        "spec.deletionStrategy.deletionRules[1]",
    ),
    "no cluster": (_CLUSTER, MISSING, _CLUSTER),
    "a cluster that is selected, and tried again": (
        "spec.clusterSelector",
        {"ray.io/cluster": "shared"},
        "spec.backoffLimit",
    ),
    "a submitter for a sidecar": ("spec.submissionMode", "SidecarMode", "spec.submitterPodTemplate"),
    "an environment that is no YAML": ("spec.runtimeEnvYAML", "env_vars: [", "spec.runtimeEnvYAML"),
    "a negative number of tries": ("spec.backoffLimit", -1, "spec.backoffLimit"),
    "a deadline of nothing": ("spec.activeDeadlineSeconds", 0, "spec.activeDeadlineSeconds"),
    "a pod without a container": (f"{_WORKER_POD}.containers", [], f"{_WORKER_POD}.containers"),
    "resources said twice": (f"{_HEAD}.resources", {"CPU": "0"}, f"{_HEAD}.rayStartParams"),
    "labels among the parameters": (f"{_HEAD}.rayStartParams.labels", "a=b", f"{_HEAD}.rayStartParams.labels"),
    "a label that is none": (f"{_WORKERS}.labels", {"pool": "a b"}, f"{_WORKERS}.labels.pool"),
    "more at least than at most": (f"{_WORKERS}.minReplicas", 5, f"{_WORKERS}.minReplicas"),
    "more than at most": (f"{_WORKERS}.replicas", 3, f"{_WORKERS}.replicas"),
    "a priority without the autoscaler": (f"{_WORKERS}.priority", 3, f"{_WORKERS}.priority"),
    "a strategy for upgrades": (f"{_CLUSTER}.upgradeStrategy", {"type": "Recreate"}, f"{_CLUSTER}.upgradeStrategy"),
    "a token of an old Ray": (f"{_CLUSTER}.rayVersion", "2.40.0", f"{_CLUSTER}.rayVersion"),
    "Redis without its options": (
        f"{_HEAD_POD}.containers.0.env",
        [{"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}],
        f"{_HEAD_POD}.containers[0].env[0]",
    ),
    "a manager that is unknown": ("spec.managedBy", "me", "spec.managedBy"),
}
"""The operator would refuse these, minutes later."""

TRAPS = {
    "a mistyped way to submit": ("spec.submissionMode", "K8sJobmode", "spec.submissionMode"),
    "an empty entrypoint": ("spec.entrypoint", " ", "spec.entrypoint"),
    "two lines of entrypoint": ("spec.entrypoint", "python a.py\npython b.py", "spec.entrypoint"),
    "one id for all tries": ("spec.jobId", "mine", "spec.jobId"),
    "a secret in the environment": ("spec.runtimeEnvYAML", "env_vars: \n  HF_TOKEN: hf_x", "spec.runtimeEnvYAML"),
    "a mount without its volume": (f"{_WORKER_POD}.volumes", [], f"{_WORKER_POD}.containers[0].volumeMounts[0].name"),
    "a folder that is mounted twice": (
        f"{_RAY}.volumeMounts.1.mountPath",
        "/dev/shm",
        f"{_WORKER_POD}.containers[0].volumeMounts[1].mountPath",
    ),
    "other GPUs requested than allowed": (
        f"{_RAY}.resources.requests",
        {"nvidia.com/gpu": "2"},
        f"{_WORKER_POD}.containers[0].resources.requests.nvidia.com/gpu",
    ),
    "more memory requested than allowed": (
        f"{_RAY}.resources.requests.memory",
        "128Gi",
        f"{_WORKER_POD}.containers[0].resources.requests.memory",
    ),
    "more shared memory than memory": (
        f"{_WORKER_POD}.volumes.0.emptyDir.sizeLimit",
        "1Ti",
        f"{_WORKER_POD}.volumes[0].emptyDir.sizeLimit",
    ),
    "shared memory on a disk": (
        f"{_WORKER_POD}.volumes.0.emptyDir.medium",
        "",
        f"{_WORKER_POD}.volumes[0].emptyDir.medium",
    ),
    "a head that trains": (f"{_HEAD}.rayStartParams.num-cpus", "4", f"{_HEAD}.rayStartParams.num-cpus"),
    "a GPU for the head": (
        f"{_HEAD_POD}.containers.0.resources.limits",
        {"nvidia.com/gpu": "1"},
        f"{_HEAD_POD}.containers[0].resources.limits.nvidia.com/gpu",
    ),
    "no time to save": (
        f"{_WORKER_POD}.terminationGracePeriodSeconds",
        MISSING,
        f"{_WORKER_POD}.terminationGracePeriodSeconds",
    ),
    "root": (f"{_WORKER_POD}.securityContext.runAsUser", 0, f"{_WORKER_POD}.securityContext.runAsUser"),
    "a user who may be root": (
        f"{_HEAD_POD}.securityContext.runAsNonRoot",
        MISSING,
        f"{_HEAD_POD}.securityContext.runAsNonRoot",
    ),
    "a way to more rights": (
        f"{_RAY}.securityContext.allowPrivilegeEscalation",
        True,
        f"{_WORKER_POD}.containers[0].securityContext.allowPrivilegeEscalation",
    ),
    "a secret in the manifest": (
        f"{_RAY}.env",
        [{"name": "WANDB_API_KEY", "value": "abc"}],
        f"{_WORKER_POD}.containers[0].env[0].value",
    ),
    "another image for the workers": (f"{_RAY}.image", "other:1", f"{_WORKER_POD}.containers[0].image"),
    "another Ray than the image's": (f"{_CLUSTER}.rayVersion", "2.59.0", f"{_CLUSTER}.rayVersion"),
    "a queue and an autoscaler": (
        f"{_CLUSTER}.enableInTreeAutoscaling",
        True,
        f"{_CLUSTER}.enableInTreeAutoscaling",
    ),
    "a queue without an end": ("spec.shutdownAfterJobFinishes", False, "spec.shutdownAfterJobFinishes"),
}
"""Everybody would take these, and something would go wrong hours later."""


def fields(manifest: dict[str, Any]) -> list[str]:
    return [problem.partition(": ")[0] for problem in manifest_problems(manifest, crd())]


def shown(path: str) -> str:
    return path.replace(".workerGroupSpecs.0", ".workerGroupSpecs[0]")


def test_the_manifest_was_right_before() -> None:
    assert manifest_problems(manifest_of(), crd()) == []
    assert len(SCHEMA | OPERATOR | TRAPS) >= 50


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [pytest.param(*case, id=what) for cases in (SCHEMA, OPERATOR, TRAPS) for what, case in cases.items()],
)
def test_a_mistake_is_refused_and_its_field_named(path: str, value: Any, field: str) -> None:
    words = ("recipe=chinese_llama", "stage=2", "cluster=kubernetes", "cluster.queue=training")
    assert shown(field) in fields(planted(manifest_of(*words), path, value))


@pytest.mark.parametrize("cases", [OPERATOR, TRAPS], ids=["the operator's rules", "the traps"])
def test_the_schema_alone_would_let_it_through(cases: dict[str, tuple[str, Any, str]]) -> None:
    """Or there would be no need for rules of ours."""
    schema, manifest = read_schema(crd()), manifest_of()
    changed = {what: planted(manifest, path, value) for what, (path, value, _) in cases.items()}
    assert len([what for what in changed if not schema_problems(changed[what], schema)]) > 0.8 * len(cases)
