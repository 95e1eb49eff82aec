"""How many workers there are, and what each gets."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from orchestrator.cluster.capacity import Capacity, accelerator
from orchestrator.errors import ClusterError, RecipeError
from orchestrator.schema import Cluster, KubernetesCluster, PlacedCluster, Range, TrainStage


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
    labels = cluster.labels if isinstance(cluster, PlacedCluster) else {}
    capacity = capacity.selected(labels)
    size = _of_each(capacity, cluster)
    most = capacity.holds(size.bundle)
    if requested is None and isinstance(cluster, KubernetesCluster) and cluster.grows:
        # Pods that are there at first are the fewest.
        requested = Range(fewest=max(1, most * cluster.fewest_nodes // cluster.most_nodes), most=most)
    if requested is None:
        fitting = [number for number in range(most, 0, -1) if not _indivisible(number, stages)]
        requested = fitting[0] if fitting else 1
    fewest = requested.fewest if isinstance(requested, Range) else requested
    allowed = allowed_numbers(requested, stages) if fewest <= most else (fewest,)
    if allowed[0] > most:
        where = f"{capacity} labelled {labels}" if labels else str(capacity)
        raise RecipeError(f"workers: {allowed[0]} of {size.bundle} are more than this cluster can give: {most} ({where})")
    if isinstance(cluster, PlacedCluster):
        return replace(size, allowed=allowed)
    # A cluster may run more than this; a machine that only runs this is shared out whole.
    at_once = max(number for number in allowed if number <= most)
    return replace(size, allowed=allowed, cpus=capacity.total("CPU") // at_once)


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


def _of_each(capacity: Capacity, cluster: Cluster) -> Size:
    """What each worker takes at the least; a GPU where there are any."""
    gpus = 1 if capacity.total("GPU") else 0
    if isinstance(cluster, PlacedCluster):
        other = {**accelerator(cluster.accelerator_type), **cluster.resources}
        return Size((), gpus, cluster.cpus_per_worker, other, cluster.labels, cluster.placement)
    return Size((), gpus, cluster.cpus_per_worker)


def _indivisible(num_workers: int, stages: Mapping[str, TrainStage]) -> list[str]:
    return [
        f"stages.{name}: global_batch_size {stage.global_batch_size:,} is not divisible by "
        f"micro_batch_size {stage.resources.micro_batch_size} x {num_workers} workers "
        f"= {stage.resources.micro_batch_size * num_workers}"
        for name, stage in stages.items()
        if stage.global_batch_size % (stage.resources.micro_batch_size * num_workers)
    ]
