"""How many workers, and what each gets."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.errors import ClusterError, RecipeError
from orchestrator.schema import Cluster, KubernetesCluster, PlacedCluster, Range, TrainStage


@dataclass(frozen=True)
class Capacity:
    """What a cluster can ever give."""

    cpus: int
    gpus: int
    nodes: int


def declared_capacity(cluster: KubernetesCluster) -> Capacity:
    """What a cluster will give once all of its nodes are there."""
    nodes = cluster.most_nodes
    return Capacity(nodes * cluster.cpus_per_node, nodes * cluster.gpus_per_node, nodes)


@dataclass(frozen=True)
class Size:
    """How many workers there may be, one process a device, and what each takes."""

    allowed: tuple[int, ...]
    """Ascending; one number unless the recipe gives a range."""
    gpus: int
    """Of each worker."""
    cpus: int
    other: Mapping[str, float] = field(default_factory=dict)
    """Custom resources of each worker, by name."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What the labels of a worker's node must be."""
    placement: Literal["pack", "spread"] = "pack"
    """On as few nodes as possible, or on as many."""

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray reserves for one worker."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {}), **self.other}


def workers_for(
    requested: int | Range | None, capacity: Capacity, cluster: Cluster, stages: Mapping[str, TrainStage]
) -> Size:
    """The workers asked for, or as many as fit the cluster and divide every stage's batch.

    RecipeError when the cluster can never give as many, or a batch does not divide; all stages are named at once.
    """
    most = _most_workers(capacity, cluster)
    if requested is None and isinstance(cluster, KubernetesCluster) and cluster.grows:
        # Pods that are there at first are the fewest.
        requested = Range(fewest=max(1, most * cluster.fewest_nodes // cluster.most_nodes), most=most)
    if requested is None:
        fitting = [number for number in range(most, 0, -1) if not _indivisible(number, stages)]
        requested = fitting[0] if fitting else 1
    fewest = requested.fewest if isinstance(requested, Range) else requested
    allowed = allowed_numbers(requested, stages) if fewest <= most else (fewest,)
    if allowed[0] > most:
        raise RecipeError(
            f"workers: {allowed[0]} are more than this cluster can give: {most} "
            f"({capacity.gpus} GPUs and {capacity.cpus} CPUs on {capacity.nodes} nodes)"
        )
    return _size(allowed, most, capacity, cluster)


def check_precision(precision: str, size: Size) -> None:
    """RecipeError for fp16 without GPUs, which DeepSpeed cannot do."""
    if precision == "fp16" and size.gpus == 0:
        raise RecipeError("precision: fp16 trains on GPUs only, and this cluster has none; use bf16 or fp32")


def check_compiler(size: Size) -> None:
    """DeepSpeed builds one small op for communication between CPU workers; ClusterError says what is missing."""
    if size.gpus == 0 and not (shutil.which("c++") or shutil.which("g++") or os.environ.get("CXX")):
        raise ClusterError(
            "no C++ compiler: DeepSpeed builds an op for training on CPU; install g++ (Debian: apt install g++)"
        )


def allowed_numbers(requested: int | Range, stages: Mapping[str, TrainStage]) -> tuple[int, ...]:
    """The numbers of workers, ascending, that share every stage's global batch evenly; RecipeError when there is none."""
    most = requested.most if isinstance(requested, Range) else requested
    fewest = requested.fewest if isinstance(requested, Range) else requested
    allowed = tuple(number for number in range(fewest, most + 1) if not _indivisible(number, stages))
    if not allowed:
        raise RecipeError(_indivisible(most, stages))
    return allowed


def _most_workers(capacity: Capacity, cluster: Cluster) -> int:
    """One for each GPU where there are any, as far as the CPUs allow."""
    if isinstance(cluster, KubernetesCluster):
        # By node, since all are alike: what two of them have left over together is of no use.
        by_cpu = cluster.cpus_per_node // cluster.cpus_per_worker
        return cluster.most_nodes * (min(by_cpu, cluster.gpus_per_node) if cluster.gpus_per_node else by_cpu)
    by_cpu = capacity.cpus // (cluster.cpus_per_worker if isinstance(cluster, PlacedCluster) else 1)
    return min(by_cpu, capacity.gpus) if capacity.gpus else by_cpu


def _size(allowed: tuple[int, ...], most: int, capacity: Capacity, cluster: Cluster) -> Size:
    # A cluster may run more than this; a machine that only runs this is shared out whole.
    at_once = max(number for number in allowed if number <= most)
    gpus = 1 if capacity.gpus else 0
    if not isinstance(cluster, PlacedCluster):
        return Size(allowed, gpus, capacity.cpus // at_once)
    # As Ray keeps to an accelerator: every node that has one has a little of a resource of that name.
    accelerator = {f"accelerator_type:{cluster.accelerator_type}": 0.001} if cluster.accelerator_type else {}
    other = {**accelerator, **cluster.resources}
    return Size(allowed, gpus, cluster.cpus_per_worker, other, cluster.labels, cluster.placement)


def _indivisible(num_workers: int, stages: Mapping[str, TrainStage]) -> list[str]:
    return [
        f"stages.{name}: global_batch_size {stage.global_batch_size:,} is not divisible by "
        f"micro_batch_size {stage.resources.micro_batch_size} x {num_workers} workers "
        f"= {stage.resources.micro_batch_size * num_workers}"
        for name, stage in stages.items()
        if stage.global_batch_size % (stage.resources.micro_batch_size * num_workers)
    ]
