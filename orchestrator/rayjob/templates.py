"""The three kinds of pod of a RayJob: Ray's head, a node that trains, and the one that hands the entrypoint in."""

from orchestrator.rayjob.names import PREFIX
from orchestrator.rayjob.places import mount_path
from orchestrator.rayjob.pod import (
    Affinity,
    AffinityTerm,
    Amounts,
    Capabilities,
    Claim,
    Command,
    Container,
    ContainerSecurity,
    Handler,
    Lifecycle,
    LocalName,
    Memory,
    Metadata,
    Mount,
    PodAffinity,
    PodSecurity,
    PodSpec,
    PodTemplate,
    Seccomp,
    SecretReference,
    Selector,
    TolerationPart,
    ValueSource,
    Variable,
    Volume,
    WeightedTerm,
)
from orchestrator.schema import KubernetesCluster

SUBMITTER_CONTAINER = "ray-job-submitter"
"""Its log is the command's output."""
_SHARED_MEMORY = "shared-memory"
_ROLE = f"{PREFIX}role"
# Told that its pod is about to go, a node drains: ranks save and move, or the command saves and says how to go on.
_LEAVE = ("python", "-m", "orchestrator.cluster.leave")
_MARGIN_SECONDS = 10
"""Between the end of leaving and the kill."""


def head_pod(cluster: KubernetesCluster, labels: dict[str, str]) -> PodTemplate:
    amounts = {"cpu": str(cluster.head.cpus), "memory": cluster.head.memory}
    template = _pod(
        cluster, {**labels, _ROLE: "head"}, _ray_container(cluster, "ray-head", amounts), cluster.head.shared_memory
    )
    # The autoscaler in the head's pod asks for more pods.
    spec = template.spec.model_copy(update={"automount_service_account_token": cluster.grows})
    return template.model_copy(update={"spec": spec})


def worker_pod(cluster: KubernetesCluster, labels: dict[str, str]) -> PodTemplate:
    gpus = {cluster.gpu_resource: str(cluster.gpus_per_node)} if cluster.gpus_per_node else {}
    rdma = {name: str(amount) for name, amount in cluster.rdma.items()}
    amounts = {"cpu": str(cluster.cpus_per_node), "memory": cluster.memory_per_node, **gpus, **rdma}
    container = _ray_container(cluster, "ray-worker", amounts)
    own = {**labels, _ROLE: "worker"}
    template = _pod(cluster, own, container, cluster.shared_memory)
    spec = template.spec.model_copy(
        update={
            "node_selector": cluster.node_selector or None,
            "tolerations": tuple(
                TolerationPart(key=each.key, operator=each.operator, value=each.value, effect=each.effect)
                for each in cluster.tolerations
            )
            or None,
            "affinity": _together(cluster.topology_key, own) if cluster.topology_key else None,
        }
    )
    return template.model_copy(update={"spec": spec})


def submitter_pod(cluster: KubernetesCluster, labels: dict[str, str]) -> PodTemplate:
    """It has no volume and no secret: it talks to Ray's job server and prints what the command prints."""
    amounts = {"cpu": "500m", "memory": "1Gi"}
    container = Container(
        name=SUBMITTER_CONTAINER,
        image=cluster.image,
        working_dir=cluster.project_folder,
        env=(),
        resources=Amounts(requests=amounts, limits=amounts),
        volume_mounts=(),
        security_context=container_security(),
    )
    return PodTemplate(
        metadata=Metadata(labels={**labels, _ROLE: "submitter"}),
        spec=_spec(cluster, container, volumes=()),
    )


def _pod(cluster: KubernetesCluster, labels: dict[str, str], container: Container, shared_memory: str) -> PodTemplate:
    volumes = (
        Volume(name=_SHARED_MEMORY, empty_dir=Memory(medium="Memory", size_limit=shared_memory)),
        *(
            Volume(name=name, persistent_volume_claim=Claim(claim_name=volume.claim))
            for name, volume in cluster.volumes.items()
        ),
    )
    return PodTemplate(metadata=Metadata(labels=labels), spec=_spec(cluster, container, volumes))


def _spec(cluster: KubernetesCluster, container: Container, volumes: tuple[Volume, ...]) -> PodSpec:
    return PodSpec(
        containers=(container,),
        volumes=volumes,
        security_context=PodSecurity(
            run_as_non_root=True,
            run_as_user=cluster.run_as_user,
            run_as_group=cluster.run_as_group,
            fs_group=cluster.run_as_group,
            fs_group_change_policy="OnRootMismatch",
            seccomp_profile=Seccomp(type="RuntimeDefault"),
        ),
        # A pod that ended is replaced by the operator, as another node; the same one again would keep a half of its state.
        restart_policy="Never",
        termination_grace_period_seconds=cluster.grace_seconds,
        # Nothing else of ours asks the API server anything.
        automount_service_account_token=False,
        service_account_name=cluster.service_account,
        image_pull_secrets=tuple(LocalName(name=name) for name in cluster.image_pull_secrets) or None,
        priority_class_name=cluster.priority_class,
    )


def _ray_container(cluster: KubernetesCluster, name: str, amounts: dict[str, str]) -> Container:
    leave = (*_LEAVE, str(_leaving_seconds(cluster)))
    return Container(
        name=name,
        image=cluster.image,
        working_dir=cluster.project_folder,
        env=_variables(cluster),
        resources=Amounts(requests=amounts, limits=amounts),
        volume_mounts=(
            Mount(name=_SHARED_MEMORY, mount_path="/dev/shm"),
            *(
                Mount(name=name, mount_path=mount_path(cluster, volume.path), read_only=volume.read_only or None)
                for name, volume in cluster.volumes.items()
            ),
        ),
        security_context=container_security(),
        lifecycle=Lifecycle(pre_stop=Handler(run=Command(command=leave))),
    )


def _variables(cluster: KubernetesCluster) -> tuple[Variable, ...]:
    # Asked to stop a job, Ray's job server sends SIGTERM, and after three seconds by default SIGKILL.
    own = {"RAY_JOB_STOP_WAIT_TIME_S": str(_leaving_seconds(cluster)), **cluster.environment}
    secret = [
        Variable(name=name, value_from=ValueSource(secret_key_ref=SecretReference(name=key.name, key=key.key)))
        for name, key in cluster.secrets.items()
    ]
    return (*(Variable(name=name, value=value) for name, value in own.items()), *secret)


def _leaving_seconds(cluster: KubernetesCluster) -> int:
    return max(1, cluster.grace_seconds - _MARGIN_SECONDS)


def container_security() -> ContainerSecurity:
    """An ordinary user's rights, and no way to more."""
    return ContainerSecurity(allow_privilege_escalation=False, capabilities=Capabilities(drop=("ALL",)))


def _together(topology_key: str, labels: dict[str, str]) -> Affinity:
    term = AffinityTerm(label_selector=Selector(match_labels=labels), topology_key=topology_key)
    weighted = WeightedTerm(weight=100, pod_affinity_term=term)
    return Affinity(pod_affinity=PodAffinity(preferred_during_scheduling_ignored_during_execution=(weighted,)))
