"""How many workers, and what each gets."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.errors import ClusterError, RecipeError
from orchestrator.schema import AddressCluster, Cluster, TrainStage, WorkerRange


@dataclass(frozen=True)
class Capacity:
    """What a cluster can ever give."""

    cpus: int
    gpus: int
    nodes: int


@dataclass(frozen=True)
class Size:
    """How many workers there may be, one process a device, and what each takes."""

    allowed: tuple[int, ...]
    """Ascending; one number unless the recipe gives a range."""
    gpus: int
    """Of each worker."""
    cpus: int

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray reserves for one worker."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def workers_for(
    requested: int | WorkerRange | None, capacity: Capacity, cluster: Cluster, stages: Mapping[str, TrainStage]
) -> Size:
    """The workers asked for, or as many as fit the cluster and divide every stage's batch.

    RecipeError when the cluster can never give as many, or a batch does not divide; all stages are named at once.
    """
    most = _most_workers(capacity, cluster)
    if requested is None:
        fitting = [number for number in range(most, 0, -1) if not _indivisible(number, stages)]
        requested = fitting[0] if fitting else 1
    fewest = requested.fewest if isinstance(requested, WorkerRange) else requested
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


def allowed_numbers(requested: int | WorkerRange, stages: Mapping[str, TrainStage]) -> tuple[int, ...]:
    """The numbers of workers, ascending, that share every stage's global batch evenly; RecipeError when there is none."""
    most = requested.most if isinstance(requested, WorkerRange) else requested
    fewest = requested.fewest if isinstance(requested, WorkerRange) else requested
    allowed = tuple(number for number in range(fewest, most + 1) if not _indivisible(number, stages))
    if not allowed:
        raise RecipeError(_indivisible(most, stages))
    return allowed


def _most_workers(capacity: Capacity, cluster: Cluster) -> int:
    """One for each GPU where there are any, as far as the CPUs allow."""
    by_cpu = capacity.cpus // (cluster.cpus_per_worker if isinstance(cluster, AddressCluster) else 1)
    return min(by_cpu, capacity.gpus) if capacity.gpus else by_cpu


def _size(allowed: tuple[int, ...], most: int, capacity: Capacity, cluster: Cluster) -> Size:
    # A cluster may run more than this; a machine that only runs this is shared out whole.
    at_once = max(number for number in allowed if number <= most)
    cpus = cluster.cpus_per_worker if isinstance(cluster, AddressCluster) else capacity.cpus // at_once
    return Size(allowed, 1 if capacity.gpus else 0, cpus)


def _indivisible(num_workers: int, stages: Mapping[str, TrainStage]) -> list[str]:
    return [
        f"stages.{name}: global_batch_size {stage.global_batch_size:,} is not divisible by "
        f"micro_batch_size {stage.resources.micro_batch_size} x {num_workers} workers "
        f"= {stage.resources.micro_batch_size * num_workers}"
        for name, stage in stages.items()
        if stage.global_batch_size % (stage.resources.micro_batch_size * num_workers)
    ]
