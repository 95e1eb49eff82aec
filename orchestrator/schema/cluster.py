"""Where a recipe runs. None of it changes what is learned."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from orchestrator.schema.strict import Schema

_QUANTITY = re.compile(r"[1-9]\d*(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")


class LocalCluster(Schema):
    """Ray, started on this machine for the length of the command."""

    kind: Literal["local"]
    gpus: NonNegativeInt | None = None
    """GPUs to use; all there are by default."""
    cpus: PositiveInt | None = None
    """CPU cores to use; all there are by default."""
    cpus_per_worker: PositiveInt = 1
    """At the least; workers share evenly what there is."""


class PlacedCluster(Schema):
    """How workers are placed on a cluster of nodes. Those of one node are always neighbours."""

    cpus_per_worker: PositiveInt = 1
    placement: Literal["pack", "spread"] = "pack"
    """pack takes as few nodes as possible; spread takes as many."""
    accelerator_type: str | None = None
    """Ray's name of a device, such as H100; workers go nowhere else."""
    labels: dict[str, str] = Field(default={})
    """Ray's labels of the nodes that workers may go to; a value may be in(a,b), !x or !in(a,b)."""
    resources: dict[str, PositiveFloat] = Field(default={})
    """Custom resources that each worker takes besides its device and CPUs."""


class AddressCluster(PlacedCluster):
    """A Ray cluster that is already running."""

    kind: Literal["address"]
    address: str
    """auto or host:port, as `ray start` printed it, or ray://host:10001 from a machine that is no node of it."""
    code: Literal["ship", "installed"] = "ship"
    """ship sends this project's code to the nodes; installed takes what they have, once it is seen to be the same."""


class Range(Schema):
    """Written `2-8`: as many workers or nodes as the cluster gives at the time, between these."""

    fewest: PositiveInt
    most: PositiveInt


def as_range(value: object) -> object:
    """`2-8` as a mapping; numbers, and ranges that were written out, as they are."""
    match = re.fullmatch(r"\s*([1-9]\d*)\s*-\s*([1-9]\d*)\s*", value) if isinstance(value, str) else None
    if match and int(match[1]) <= int(match[2]):
        return {"fewest": int(match[1]), "most": int(match[2])}
    is_number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if is_number or isinstance(value, dict | Schema):
        return value
    raise ValueError(f"input should be a number above 0, or a range of two such as 2-8, not {value!r}")


def _quantity(value: str) -> str:
    if not _QUANTITY.fullmatch(value):
        raise ValueError(f"{value!r} is no quantity of Kubernetes; write 64Gi, 500Mi or the like")
    return value


Quantity = Annotated[str, AfterValidator(_quantity)]
"""Bytes as Kubernetes writes them, such as 64Gi."""


class SecretKey(Schema):
    """One entry of a Kubernetes Secret."""

    name: str
    """Of the Secret."""
    key: str


class ClaimedVolume(Schema):
    """A PersistentVolumeClaim, and where the pods see it. All pods mount it, so it must be ReadWriteMany."""

    claim: str
    path: str
    """Absolute, or below the project's folder in the image."""
    read_only: bool = False


class Toleration(Schema):
    """A taint that the pods may be placed in spite of."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class HeadPod(Schema):
    """The pod of Ray's head, which runs the command and trains nothing."""

    cpus: PositiveInt = 4
    memory: Quantity = "16Gi"
    shared_memory: Quantity = "6Gi"
    """Ray's object store takes 30 % of the memory."""


class Shutdown(Schema):
    """All pods go so long after the end; the RayJob itself stays, to be looked at."""

    kind: Literal["shutdown"]
    seconds: NonNegativeInt = 60


class DeletionRules(Schema):
    """The workers go first, then the head, which has the logs, then the RayJob."""

    kind: Literal["rules"]
    workers_seconds: NonNegativeInt = 0
    """After the end. With a range of nodes they stay until the cluster goes, or the autoscaler finds them idle."""
    cluster_seconds: NonNegativeInt = 3600
    job_seconds: NonNegativeInt = 604_800

    @model_validator(mode="after")
    def _check(self) -> "DeletionRules":
        if not self.workers_seconds <= self.cluster_seconds <= self.job_seconds:
            raise ValueError(
                f"workers_seconds {self.workers_seconds}, cluster_seconds {self.cluster_seconds} and "
                f"job_seconds {self.job_seconds} must not fall"
            )
        return self


Cleanup = Annotated[Shutdown | DeletionRules, Field(discriminator="kind")]


class KubernetesCluster(PlacedCluster):
    """A Ray cluster that KubeRay makes for the length of a RayJob; `launch/submit.py` hands it in."""

    kind: Literal["kubernetes"]
    image: str
    """Has this project in `project_folder` and the pinned dependencies (k8s/Dockerfile)."""
    project_folder: str = "/opt/orchestrator"
    namespace: str = "orchestrator"
    context: str | None = None
    """Of the kubeconfig; its current one by default."""

    nodes: Annotated[PositiveInt | Range, BeforeValidator(as_range)] = 1
    """Pods that train. A range such as 1-4 begins with the fewest, and grows as the cluster gives more."""
    gpus_per_node: NonNegativeInt = 1
    """0 trains on CPUs."""
    gpu_resource: str = "nvidia.com/gpu"
    cpus_per_node: PositiveInt = 8
    memory_per_node: Quantity = "64Gi"
    """Holds what shared_memory takes, too."""
    shared_memory: Quantity = "16Gi"
    rdma: dict[str, PositiveInt] = Field(default={})
    """Resources of a network that bypasses the kernel, such as {rdma/ib: 8}, for each node."""
    head: HeadPod = HeadPod()

    volumes: dict[str, ClaimedVolume] = Field(default={})
    """By name. The run root lies in one of them, unless it is an object store."""
    secrets: dict[str, SecretKey] = Field(default={})
    """Environment variables that come from Secrets, such as WANDB_API_KEY and HF_TOKEN: by reference only."""
    environment: dict[str, str] = Field(default={})
    """Other environment variables of all pods; nothing secret."""
    image_pull_secrets: tuple[str, ...] = ()
    service_account: str | None = None

    node_selector: dict[str, str] = Field(default={})
    tolerations: tuple[Toleration, ...] = ()
    topology_key: str | None = None
    """A label of the nodes that is alike where the network is fast (rack, block); pods keep together there if they can."""
    priority_class: str | None = None
    queue: str | None = None
    """Kueue's LocalQueue."""

    run_as_user: PositiveInt = 1000
    run_as_group: PositiveInt = 1000
    grace_seconds: PositiveInt = 300
    """From the notice to the end of a pod; more than a step and a checkpoint take."""
    backoff_limit: NonNegativeInt = 3
    """New Ray clusters after a failure that the command itself could not survive, such as a lost head."""
    active_deadline_seconds: PositiveInt | None = None
    """For one try; reaching it is not tried again."""
    start_deadline_seconds: PositiveInt | None = None
    """For pods to be placed and images to be pulled; reaching it is tried again."""
    cleanup: Cleanup = Shutdown(kind="shutdown")

    @model_validator(mode="after")
    def _check(self) -> "KubernetesCluster":
        if self.queue and self.cleanup.kind == "rules":
            raise ValueError("queue and cleanup.kind=rules exclude each other: Kueue wants cleanup.kind=shutdown")
        if self.queue and self.grows:
            raise ValueError("queue and a range of nodes exclude each other: Kueue admits jobs whole; give a number")
        if self.resources:
            raise ValueError(f"resources {', '.join(self.resources)}: none of the pods has them; use node_selector")
        for name, value in self.labels.items():
            if value.startswith(("!", "in(")):
                raise ValueError(f"labels.{name} {value!r} is a selector, and all pods of a job are alike; give a value")
        if not self.project_folder.startswith("/"):
            raise ValueError(f"project_folder {self.project_folder!r} is not absolute")
        return self

    @property
    def fewest_nodes(self) -> int:
        return self.nodes.fewest if isinstance(self.nodes, Range) else self.nodes

    @property
    def most_nodes(self) -> int:
        return self.nodes.most if isinstance(self.nodes, Range) else self.nodes

    @property
    def grows(self) -> bool:
        """Whether there may be more nodes later than at first."""
        return self.fewest_nodes < self.most_nodes


Cluster = Annotated[LocalCluster | AddressCluster | KubernetesCluster, Field(discriminator="kind")]
