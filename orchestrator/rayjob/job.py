"""A RayJob as a value. What the operator asks of one beyond types is in rules.py."""

from typing import Literal

from pydantic import Field

from orchestrator.rayjob.parts import Part
from orchestrator.rayjob.pod import ContainerSecurity, Metadata, PodTemplate


class HeadGroup(Part):
    """Ray's head."""

    ray_start_params: dict[str, str]
    template: PodTemplate


class WorkerGroup(Part):
    """Nodes of one shape."""

    group_name: str
    replicas: int
    min_replicas: int
    max_replicas: int
    ray_start_params: dict[str, str]
    labels: dict[str, str] | None = None
    """Ray's, of each node."""
    template: PodTemplate


class Autoscaler(Part):
    """Of Ray's."""

    version: Literal["v2"]
    idle_timeout_seconds: int
    security_context: ContainerSecurity


class Auth(Part):
    """What Ray asks of those who connect."""

    mode: Literal["token", "disabled"]


class RayCluster(Part):
    """The cluster that the job gets for itself."""

    ray_version: str
    head_group_spec: HeadGroup
    worker_group_specs: tuple[WorkerGroup, ...]
    enable_in_tree_autoscaling: bool | None = None
    autoscaler_options: Autoscaler | None = None
    auth_options: Auth


Policy = Literal["DeleteWorkers", "DeleteCluster", "DeleteSelf"]


class Condition(Part):
    """When a deletion rule applies."""

    job_status: Literal["SUCCEEDED", "FAILED"] | None = None
    """Of the command."""
    job_deployment_status: Literal["Failed"] | None = None
    """Of the job as a whole, also when its command never ran."""
    ttl_seconds: int


class DeletionRule(Part):
    """What goes then."""

    policy: Policy
    condition: Condition


class DeletionStrategy(Part):
    """All of the rules."""

    deletion_rules: tuple[DeletionRule, ...]


class SubmitterConfig(Part):
    """Of the pod that hands the entrypoint to Ray."""

    backoff_limit: int


class RayJobSpec(Part):
    """What is run, on what, and for how long."""

    entrypoint: str
    runtime_env_yaml: str = Field(alias="runtimeEnvYAML")
    submission_mode: Literal["K8sJobMode"]
    submitter_config: SubmitterConfig
    submitter_pod_template: PodTemplate
    shutdown_after_job_finishes: bool
    ttl_seconds_after_finished: int | None = None
    deletion_strategy: DeletionStrategy | None = None
    backoff_limit: int
    active_deadline_seconds: int | None = None
    pre_running_deadline_seconds: int | None = None
    suspend: bool | None = None
    ray_cluster_spec: RayCluster


class RayJob(Part):
    """KubeRay's object for one job on a cluster of its own."""

    api_version: Literal["ray.io/v1"] = "ray.io/v1"
    kind: Literal["RayJob"] = "RayJob"
    metadata: Metadata
    spec: RayJobSpec
