"""From a recipe and the words that made it to the RayJob that runs them."""

from collections.abc import Sequence
from importlib.metadata import version

import yaml

from orchestrator.rayjob.entrypoint import entrypoint_of
from orchestrator.rayjob.job import (
    Auth,
    Autoscaler,
    Condition,
    DeletionRule,
    DeletionStrategy,
    HeadGroup,
    Policy,
    RayCluster,
    RayJob,
    RayJobSpec,
    SubmitterConfig,
    WorkerGroup,
)
from orchestrator.rayjob.names import job_labels, job_name
from orchestrator.rayjob.places import check_places, with_hub_folder
from orchestrator.rayjob.pod import Metadata
from orchestrator.rayjob.templates import container_security, head_pod, submitter_pod, worker_pod
from orchestrator.schema import KubernetesCluster, Recipe
from orchestrator.schema.cluster import DeletionRules, Shutdown

_SUBMITTER_TRIES = 2
"""The submitter only hands in and follows: trying again finds the job that it handed in before."""
_IDLE_SECONDS = 300
"""A node that nobody uses goes after that; between two stages there is work for less."""


def build_rayjob(recipe: Recipe, cluster: KubernetesCluster, words: Sequence[str]) -> RayJob:
    """The job whose entrypoint is `python launch/run.py` with these words; RecipeError where pods could not run them."""
    check_places(recipe, cluster)
    cluster = with_hub_folder(recipe, cluster)
    labels = job_labels(recipe)
    # KubeRay has a label of this name for its pods, by which it finds the head.
    of_pods = {name: value for name, value in labels.items() if name != "app.kubernetes.io/name"}
    queued = {"kueue.x-k8s.io/queue-name": cluster.queue} if cluster.queue else {}
    return RayJob(
        metadata=Metadata(name=job_name(recipe), namespace=cluster.namespace, labels={**labels, **queued}),
        spec=RayJobSpec(
            entrypoint=entrypoint_of(["python", "launch/run.py", *words]),
            # Into the job's metadata and Ray's dashboard, so nothing that is anybody's secret.
            runtime_env_yaml=yaml.safe_dump({"env_vars": {"PYTHONUNBUFFERED": "1"}}),
            submission_mode="K8sJobMode",
            submitter_config=SubmitterConfig(backoff_limit=_SUBMITTER_TRIES),
            submitter_pod_template=submitter_pod(cluster, of_pods),
            backoff_limit=cluster.backoff_limit,
            active_deadline_seconds=cluster.active_deadline_seconds,
            pre_running_deadline_seconds=cluster.start_deadline_seconds,
            ray_cluster_spec=_ray_cluster(cluster, of_pods),
            shutdown_after_job_finishes=isinstance(cluster.cleanup, Shutdown),
            ttl_seconds_after_finished=cluster.cleanup.seconds if isinstance(cluster.cleanup, Shutdown) else None,
            deletion_strategy=_rules(cluster.cleanup, cluster.grows) if isinstance(cluster.cleanup, DeletionRules) else None,
        ),
    )


def as_yaml(job: RayJob) -> str:
    """For people and kubectl."""
    return yaml.safe_dump(job.as_manifest(), sort_keys=False, allow_unicode=True, width=120)


def _ray_cluster(cluster: KubernetesCluster, labels: dict[str, str]) -> RayCluster:
    return RayCluster(
        ray_version=version("ray"),
        head_group_spec=HeadGroup(
            # The head runs the command and schedules; a rank there would be lost with it, and so would it with a rank.
            ray_start_params={"dashboard-host": "0.0.0.0", "num-cpus": "0", "num-gpus": "0"},
            template=head_pod(cluster, labels),
        ),
        worker_group_specs=(
            WorkerGroup(
                group_name="workers",
                replicas=cluster.fewest_nodes,
                min_replicas=cluster.fewest_nodes,
                max_replicas=cluster.most_nodes,
                ray_start_params={},
                labels=cluster.labels or None,
                template=worker_pod(cluster, labels),
            ),
        ),
        enable_in_tree_autoscaling=cluster.grows or None,
        autoscaler_options=_autoscaler() if cluster.grows else None,
        auth_options=Auth(mode="token"),
    )


def _autoscaler() -> Autoscaler:
    return Autoscaler(version="v2", idle_timeout_seconds=_IDLE_SECONDS, security_context=container_security())


def _rules(cleanup: DeletionRules, grows: bool) -> DeletionStrategy:
    # The operator refuses to delete workers that the autoscaler looks after.
    seconds: dict[Policy, int] = {} if grows else {"DeleteWorkers": cleanup.workers_seconds}
    seconds |= {"DeleteCluster": cleanup.cluster_seconds, "DeleteSelf": cleanup.job_seconds}
    rules = []
    for policy, wait in seconds.items():
        rules.append(DeletionRule(policy=policy, condition=Condition(job_status="SUCCEEDED", ttl_seconds=wait)))
        # Of a job that passed a deadline or never began, the command has no status.
        rules.append(DeletionRule(policy=policy, condition=Condition(job_deployment_status="Failed", ttl_seconds=wait)))
    return DeletionStrategy(deletion_rules=tuple(rules))
