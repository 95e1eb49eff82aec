"""What a device could compute at most: what utilisation is a share of."""

import time

import torch

from orchestrator.plan.devices import device_named

_SIDE, _TRIES = 1024, 6


def peak_flops(precision: str) -> float:
    """Operations per second of this rank's device: the datasheet's in 16 bits, else what a matrix product reaches here.

    All ranks should ask at the same time, as they will share the machine when they train.
    """
    if torch.cuda.is_available() and precision != "fp32" and (device := device_named(torch.cuda.get_device_name())):
        return device.flops
    return _measured(torch.float32 if precision == "fp32" else torch.bfloat16)


def _measured(dtype: torch.dtype) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = (torch.ones(_SIDE, _SIDE, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(_TRIES):
        started = time.perf_counter()
        product = left @ right
        # Waits for the device.
        product[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * _SIDE**3 / best
