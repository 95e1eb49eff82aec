"""A group of training processes, started by Ray Train, that run one stage together."""

import os
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.exceptions
from ray.train.torch import TorchConfig
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from orchestrator.cluster.failures import cause_of
from orchestrator.cluster.sizing import WorkerShape
from orchestrator.errors import ClusterError

_RENDEZVOUS_SECONDS = 600


def run_workers(body: Callable[[Any], None], assignment: Any, shape: WorkerShape, folder: Path) -> None:
    """Runs `body(assignment)` on every rank, with torch.distributed up, and returns when all have finished.

    Ray's own bookkeeping goes below `folder` under a name of its own for each attempt, and is removed afterwards:
    Ray never resumes anything here. Raises the error of the worker that failed.
    """
    check_compiler(shape)
    storage = folder / "work" / "ray"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"body": body, "assignment": assignment},
        torch_config=TorchConfig(backend="nccl" if shape.gpus else "gloo", timeout_s=_RENDEZVOUS_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=shape.num_workers,
            use_gpu=shape.gpus > 0,
            resources_per_worker={"CPU": shape.cpus, **({"GPU": shape.gpus} if shape.gpus else {})},
        ),
        run_config=RunConfig(
            name=f"attempt-{uuid.uuid4().hex[:12]}", storage_path=str(storage), failure_config=FailureConfig(max_failures=0)
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise cause_of(error) from error
    except ray.exceptions.RayError as error:
        raise ClusterError(f"Ray lost the process that watches the workers: {error}") from error
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def check_compiler(shape: WorkerShape) -> None:
    """DeepSpeed builds one small op for communication between CPU workers; ClusterError says what is missing."""
    if shape.gpus == 0 and not (shutil.which("c++") or shutil.which("g++") or os.environ.get("CXX")):
        raise ClusterError(
            "no C++ compiler: DeepSpeed builds an op for training on CPU; install g++ (Debian: apt install g++)"
        )


def _worker(config: dict[str, Any]) -> None:
    # The ninja that builds DeepSpeed's op lies beside this Python, which need not be on the PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    config["body"](config["assignment"])
