"""What the workers send each other in one optimizer step, from sizes alone.

DeepSpeed 0.19 does, as counted in a real run (tests/parity/test_traffic.py): without ZeRO the gradients of what learns are
summed once a step; ZeRO-1 sums them likewise, each worker updates its part, and the parts are gathered; ZeRO-2 sums after
every micro-batch, since each keeps its part of the gradients alone; ZeRO-3 gathers all parameters for each micro-batch,
frozen ones too, and scatters the sums. The ring algorithms that NCCL and gloo use send what Patarasu and Yuan (2009) count.
"""

from dataclasses import dataclass
from typing import Literal

KEPT_PARAMETERS = 1_000_000_000
"""DeepSpeed keeps so many gathered parameters from the forward for the backward (stage3_max_live_parameters); those
of a larger model it gathers a second time."""


@dataclass(frozen=True)
class Traffic:
    """Sizes of the messages of a step, in bytes; the same for each worker."""

    all_reduced: int = 0
    all_gathered: int = 0
    reduce_scattered: int = 0

    def sent(self, workers: int) -> float:
        """Bytes that one worker sends, and receives."""
        share = (workers - 1) / workers
        return share * (2 * self.all_reduced + self.all_gathered + self.reduce_scattered)


@dataclass(frozen=True)
class Sizes:
    """Of a model, in parameters."""

    trainable: int
    total: int
    bytes_per_parameter: int = 2
    """2 in bf16 and fp16, in which gradients are exchanged, too."""


def step_traffic(zero: Literal[0, 1, 2, 3], sizes: Sizes, accumulation: int) -> Traffic:
    """Of a step of `accumulation` micro-batches on each worker."""
    learned, everything = (number * sizes.bytes_per_parameter for number in (sizes.trainable, sizes.total))
    if zero == 0:
        return Traffic(all_reduced=learned)
    if zero == 1:
        return Traffic(all_reduced=learned, all_gathered=learned)
    if zero == 2:
        return Traffic(all_reduced=learned * accumulation, all_gathered=learned)
    gathers = accumulation * (1 if sizes.total <= KEPT_PARAMETERS else 2)
    return Traffic(all_gathered=everything * gathers, reduce_scattered=learned * accumulation)
