"""A dry step: what a training stage will do at its fullest, before it does anything, in processes that leave nothing."""

import math
import time

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.data.batches import MicroBatch, StepBatch
from orchestrator.stages.assignment import DryStep, TrainAssignment
from orchestrator.stages.train import build_model, make_engine
from orchestrator.stages.transfer import bring_to_each_node
from orchestrator.train.link import Link
from orchestrator.train.metrics_hook import peak_memory_bytes


def run_dry(assignment: TrainAssignment, link: Link) -> DryStep:
    """One optimizer step with blocks that are full and carry loss everywhere; all ranks call it."""
    torch.set_num_threads(assignment.threads)
    link.beat(0, "loading")
    bring_to_each_node(assignment, link)
    model = build_model(assignment)
    engine = make_engine(assignment, model, dist.get_world_size())
    stage, micro = assignment.stage, assignment.micro_batch_size
    batch = _full_batch(micro, stage.global_batch_size // (micro * dist.get_world_size()), stage.block_length)
    link.beat(0, "computing")
    started = time.perf_counter()
    result = engine.step(batch, 0.0, 0)
    seconds = time.perf_counter() - started
    peak = torch.tensor(float(peak_memory_bytes()), dtype=torch.float64, device=engine.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    assert math.isfinite(result.loss) or assignment.precision == "fp16"
    return DryStep(seconds, int(peak.item()))


def _full_batch(micro_batch_size: int, accumulation: int, block_length: int) -> StepBatch:
    micro = tuple(MicroBatch(ids, ids) for ids in (_ids(micro_batch_size, block_length) for _ in range(accumulation)))
    rows = micro_batch_size * accumulation * dist.get_world_size()
    return StepBatch(micro, num_targets=rows * (block_length - 1), num_tokens=rows * block_length)


def _ids(rows: int, tokens: int) -> Tensor:
    """Any that every vocabulary has."""
    return torch.arange(rows * tokens).view(rows, tokens) % 64
