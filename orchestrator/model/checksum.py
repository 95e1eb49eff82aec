"""Whether a tensor is still bit for bit what it was."""

import torch
from torch import Tensor

_CHUNK = 1 << 22
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> int:
    """A position-weighted sum over the bits, on the tensor's own device; differs when any one value changes."""
    bits = tensor.detach().contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])
    weights = torch.arange(1, min(_CHUNK, max(bits.numel(), 1)) + 1, dtype=torch.int64, device=bits.device)
    total = 0
    for number, chunk in enumerate(bits.split(_CHUNK)):
        total += (number * 2 + 1) * int((chunk.to(torch.int64) * weights[: chunk.numel()]).sum())
    return total
