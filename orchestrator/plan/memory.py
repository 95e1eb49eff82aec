"""What a worker holds while it trains, part by part, from sizes alone.

The state follows from what ZeRO partitions (Rajbhandari et al. 2020): weights in the run's precision, gradients in it, and
in fp32 a master and two moments of what learns. Activations are what autograd keeps of a LLaMA block in transformers: two
norms' inputs in fp32, queries, keys, values and the attention's output, and three times the width of the MLP.
tests/integration/test_memory_forecast.py holds it against real runs.
"""

from dataclasses import dataclass
from typing import Literal

from orchestrator.plan.shape import Learned, ModelShape
from orchestrator.schema import Quantization, TrainStage

LIBRARIES = 580 * 2**20
"""Of a worker on a CPU: Python, torch, transformers, DeepSpeed and what they hold for themselves; measured."""
_SLACK = 1.35
"""Of activations on a CPU, whose allocator does not give back all that was freed; measured."""
_CONTEXT = 1.2e9
"""Of a GPU: the CUDA context, NCCL and what the allocator cannot use."""
_QUERIES = 128
_BUCKET = 1 << 23
"""Values that DeepSpeed reduces at once."""
_MOMENT_BYTES = {"adamw": 8.0, "paged_adamw": 8.0, "adamw_8bit": 2.03, "paged_adamw_8bit": 2.03}
_MOST_LOGITS = 1 << 28
"""As in model/loss.py: more of them are computed in pieces."""


@dataclass(frozen=True)
class Placed:
    """How a stage is computed."""

    zero: Literal[0, 1, 2, 3]
    workers: int
    micro_batch: int
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    on_gpu: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker at its fullest."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    libraries: float

    @property
    def total(self) -> float:
        state = self.weights + self.gradients + self.optimizer + self.buffers + self.libraries
        return state + self.activations + self.logits


def memory(shape: ModelShape, learns: Learned, stage: TrainStage, placed: Placed) -> Memory:
    """Of a worker that trains `stage`."""
    size, over = _size(placed), placed.workers
    tokens = placed.micro_batch * stage.block_length
    body = shape.body * (_bits(stage.quantization) / 8 if stage.quantization else size)
    weights = body + (shape.parameters - shape.body + learns.added) * size
    gradients = learns.trainable * size / (over if placed.zero >= 2 else 1)
    if not placed.on_gpu and size == 2:
        # The update has them in fp32. A GPU's allocator gives it what the activations had.
        gradients += 4 * learns.trainable / (over if placed.zero >= 1 else 1)
    masters = 0.0 if placed.precision == "fp32" and placed.zero == 0 else 4.0
    optimizer = learns.trainable * (masters + _MOMENT_BYTES[stage.optimizer]) / (over if placed.zero >= 1 else 1)
    if placed.zero == 3:
        # Beside its part, a worker holds the layers that are computed now.
        gathered = max(shape.table, shape.body // shape.layers) * size
        weights = weights / over + gathered
    # Whole gradients are there before they are reduced; the bucket is doubled where sending overlaps with computing.
    buffers = (_BUCKET * (2 if placed.on_gpu else 1) + learns.whole) * size
    if not placed.on_gpu and "8bit" in stage.optimizer:
        # There the update has both moments and the gradient in fp32, all at once.
        buffers += 12 * learns.trainable / (over if placed.zero >= 1 else 1)
    slack = 1.0 if placed.on_gpu else _SLACK
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=_activations(shape, learns, stage, placed) * slack,
        logits=min(tokens * shape.rows, _MOST_LOGITS) * size * slack,
        buffers=buffers,
        libraries=_CONTEXT if placed.on_gpu else LIBRARIES,
    )


def _bits(quantization: Quantization) -> float:
    """Of a weight, with the scales of its block."""
    if quantization.kind == "int8":
        return 8.0
    return 4.127 if quantization.double else 4.5


def _size(placed: Placed) -> int:
    return 4 if placed.precision == "fp32" else 2


def largest_micro_batch(shape: ModelShape, learns: Learned, stage: TrainStage, placed: Placed, limit: float) -> int:
    """The most sequences at once that fit into `limit` bytes and divide the batch of a worker; 0 where one is too many."""
    share = stage.global_batch_size // placed.workers
    fitting = (size for size in range(share, 0, -1) if share % size == 0)
    for size in fitting:
        tried = Placed(placed.zero, placed.workers, size, placed.precision, placed.on_gpu)
        if memory(shape, learns, stage, tried).total <= limit:
            return size
    return 0


def _activations(shape: ModelShape, learns: Learned, stage: TrainStage, placed: Placed) -> float:
    tokens, size = placed.micro_batch * stage.block_length, _size(placed)
    wide, narrow = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    # In fp32 a norm keeps what it is given, in 16 bits a copy of it in fp32.
    kept = 8 * shape.hidden + size * (2 * wide + 2 * narrow + 3 * shape.intermediate) + 4 * shape.heads
    if not placed.on_gpu:
        # There attention keeps its probabilities (model/attention.py), of as many keys as blocks of 128 queries see.
        kept += size * shape.heads * (stage.block_length + _QUERIES) / 2 + size * 2 * (wide - narrow)
    if learns.in_blocks:
        # What a layer that learns, or its LoRA, was given.
        kept += size * (2 * shape.hidden + wide + shape.intermediate) / 2
    if stage.resources.gradient_checkpointing:
        return tokens * (shape.layers * size * shape.hidden + kept)
    return tokens * shape.layers * kept
