"""Whether a tensor is still bit for bit what it was."""

import torch
from torch import Tensor

_CHUNK = 1 << 22
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor, first: int = 0) -> int:
    """A position-weighted sum over the bits, on the tensor's own device; differs when any one value changes.

    Those of a tensor's parts, `first` being the place of each one's first value, add up to the whole's modulo 2**64.
    """
    bits = tensor.detach().contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])
    # Sums overflow. An odd weight has an inverse modulo 2**64, so that no change of a value is lost in that.
    weights = torch.arange(min(_CHUNK, bits.numel()), dtype=torch.int64, device=bits.device) * 2 + 1
    total = 0
    for number, chunk in enumerate(bits.split(_CHUNK)):
        total += int((chunk.to(torch.int64) * (weights[: chunk.numel()] + 2 * (first + _CHUNK * number))).sum())
    return total
