"""Pods as values: the parts of Kubernetes' own objects that a RayJob of ours has."""

from typing import Literal

from pydantic import Field

from orchestrator.rayjob.parts import Part


class Metadata(Part):
    """Of the job, or of pods."""

    name: str | None = None
    namespace: str | None = None
    labels: dict[str, str] = Field(default={})
    annotations: dict[str, str] | None = None


class SecretReference(Part):
    """An entry of a Secret."""

    name: str
    key: str


class ValueSource(Part):
    """Where an environment variable comes from."""

    secret_key_ref: SecretReference


class Variable(Part):
    """An environment variable, with a value or where one is."""

    name: str
    value: str | None = None
    value_from: ValueSource | None = None


class Amounts(Part):
    """Of resources; for devices both must be the same."""

    requests: dict[str, str]
    limits: dict[str, str]


class Capabilities(Part):
    """Of Linux."""

    drop: tuple[str, ...]
    add: tuple[str, ...] | None = None


class ContainerSecurity(Part):
    """What a container may do."""

    allow_privilege_escalation: bool
    capabilities: Capabilities


class Seccomp(Part):
    """The system calls that are allowed."""

    type: Literal["RuntimeDefault"]


class PodSecurity(Part):
    """Who a pod's processes are."""

    run_as_non_root: bool
    run_as_user: int
    run_as_group: int
    fs_group: int
    fs_group_change_policy: Literal["OnRootMismatch"]
    seccomp_profile: Seccomp


class Mount(Part):
    """A volume where a container sees it."""

    name: str
    mount_path: str
    read_only: bool | None = None


class Command(Part):
    """Run inside the container."""

    command: tuple[str, ...]


class Handler(Part):
    """What is done at a moment of a container's life."""

    # `exec` is a builtin of Python.
    run: Command = Field(alias="exec")


class Lifecycle(Part):
    """Moments of a container's life."""

    pre_stop: Handler


class Container(Part):
    """One container of a pod."""

    name: str
    image: str
    working_dir: str
    env: tuple[Variable, ...]
    resources: Amounts
    volume_mounts: tuple[Mount, ...]
    security_context: ContainerSecurity
    lifecycle: Lifecycle | None = None


class Memory(Part):
    """A volume in memory."""

    medium: Literal["Memory"]
    size_limit: str


class Claim(Part):
    """A PersistentVolumeClaim."""

    claim_name: str


class Volume(Part):
    """By name; of one of two kinds."""

    name: str
    empty_dir: Memory | None = None
    persistent_volume_claim: Claim | None = None


class TolerationPart(Part):
    """A taint that does not keep the pod away."""

    key: str | None = None
    operator: str | None = None
    value: str | None = None
    effect: str | None = None


class LocalName(Part):
    """An object of the same namespace."""

    name: str


class Selector(Part):
    """Pods by their labels."""

    match_labels: dict[str, str]


class AffinityTerm(Part):
    """Together with which pods, in what sense of place."""

    label_selector: Selector
    topology_key: str


class WeightedTerm(Part):
    """One that is wished for, not demanded."""

    weight: int
    pod_affinity_term: AffinityTerm


class PodAffinity(Part):
    """Where a pod would like to be."""

    preferred_during_scheduling_ignored_during_execution: tuple[WeightedTerm, ...]


class Affinity(Part):
    """Of a pod."""

    pod_affinity: PodAffinity


class PodSpec(Part):
    """What a pod is."""

    containers: tuple[Container, ...]
    volumes: tuple[Volume, ...]
    security_context: PodSecurity
    restart_policy: Literal["Never", "OnFailure", "Always"]
    termination_grace_period_seconds: int
    automount_service_account_token: bool
    service_account_name: str | None = None
    image_pull_secrets: tuple[LocalName, ...] | None = None
    node_selector: dict[str, str] | None = None
    tolerations: tuple[TolerationPart, ...] | None = None
    affinity: Affinity | None = None
    priority_class_name: str | None = None


class PodTemplate(Part):
    """Pods that are all alike."""

    metadata: Metadata
    spec: PodSpec
