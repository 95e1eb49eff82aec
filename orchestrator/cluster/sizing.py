"""How many workers, and what each gets."""

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.errors import RecipeError
from orchestrator.schema import AddressCluster, Cluster, TrainStage


@dataclass(frozen=True)
class Capacity:
    """What a cluster can ever give."""

    cpus: int
    gpus: int
    nodes: int


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
    check_divisible(requested, stages)
    return _shape(requested, capacity, cluster)


def check_precision(precision: str, shape: WorkerShape) -> None:
    """RecipeError for fp16 without GPUs, which DeepSpeed cannot do."""
    if precision == "fp16" and shape.gpus == 0:
        raise RecipeError("precision: fp16 trains on GPUs only, and this cluster has none; use bf16 or fp32")


def check_divisible(num_workers: int, stages: Mapping[str, TrainStage]) -> None:
    """RecipeError names every stage whose global batch these workers cannot share evenly."""
    if problems := _indivisible(num_workers, stages):
        raise RecipeError(problems)


def _most_workers(capacity: Capacity, cluster: Cluster) -> int:
    """One for each GPU where there are any, as far as the CPUs allow."""
    by_cpu = capacity.cpus // (cluster.cpus_per_worker if isinstance(cluster, AddressCluster) else 1)
    return min(by_cpu, capacity.gpus) if capacity.gpus else by_cpu


def _shape(num_workers: int, capacity: Capacity, cluster: Cluster) -> WorkerShape:
    # A cluster may run more than this; a machine that only runs this is shared out whole.
    cpus = cluster.cpus_per_worker if isinstance(cluster, AddressCluster) else capacity.cpus // num_workers
    return WorkerShape(num_workers, 1 if capacity.gpus else 0, cpus)


def _indivisible(num_workers: int, stages: Mapping[str, TrainStage]) -> list[str]:
    return [
        f"stages.{name}: global_batch_size {stage.global_batch_size:,} is not divisible by "
        f"micro_batch_size {stage.resources.micro_batch_size} x {num_workers} workers "
        f"= {stage.resources.micro_batch_size * num_workers}"
        for name, stage in stages.items()
        if stage.global_batch_size % (stage.resources.micro_batch_size * num_workers)
    ]
