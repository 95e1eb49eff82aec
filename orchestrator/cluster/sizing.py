"""How many workers, and what each gets."""

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.cluster.session import Capacity
from orchestrator.errors import RecipeError
from orchestrator.schema import AddressCluster, Cluster, TrainStage


@dataclass(frozen=True)
class WorkerShape:
    """The workers of a run: one process a device."""

    num_workers: int
    gpus: int
    """Of each worker."""
    cpus: int


def workers_for(
    requested: int | None, capacity: Capacity, cluster: Cluster, stages: Mapping[str, TrainStage]
) -> WorkerShape:
    """The workers asked for, or as many as fit the cluster and divide every stage's batch.

    RecipeError when the cluster can never give as many, or a batch does not divide; all stages are named at once.
    """
    most = _most_workers(capacity, cluster)
    if requested is None:
        fitting = [number for number in range(most, 0, -1) if not _indivisible(number, stages)]
        requested = fitting[0] if fitting else 1
    if requested > most:
        raise RecipeError(
            f"workers: {requested} are more than this cluster can give: {most} "
            f"({capacity.gpus} GPUs and {capacity.cpus} CPUs on {capacity.nodes} nodes)"
        )
    if problems := _indivisible(requested, stages):
        raise RecipeError(problems)
    return _shape(requested, capacity, cluster)


def _most_workers(capacity: Capacity, cluster: Cluster) -> int:
    if isinstance(cluster, AddressCluster):
        by_cpu = capacity.cpus // cluster.cpus_per_worker
        return min(by_cpu, capacity.gpus // cluster.gpus_per_worker) if cluster.use_gpu else by_cpu
    return capacity.gpus or capacity.cpus


def _shape(num_workers: int, capacity: Capacity, cluster: Cluster) -> WorkerShape:
    if isinstance(cluster, AddressCluster):
        return WorkerShape(num_workers, cluster.gpus_per_worker if cluster.use_gpu else 0, cluster.cpus_per_worker)
    return WorkerShape(num_workers, 1 if capacity.gpus else 0, max(1, capacity.cpus // num_workers))


def _indivisible(num_workers: int, stages: Mapping[str, TrainStage]) -> list[str]:
    return [
        f"stages.{name}: global_batch_size {stage.global_batch_size:,} is not divisible by "
        f"micro_batch_size {stage.resources.micro_batch_size} x {num_workers} workers "
        f"= {stage.resources.micro_batch_size * num_workers}"
        for name, stage in stages.items()
        if stage.global_batch_size % (stage.resources.micro_batch_size * num_workers)
    ]
