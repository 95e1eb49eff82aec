"""What accelerators can do and hold, by their datasheets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Dense operations per second in 16 bits, and bytes of memory."""

    flops: float
    memory: float


DEVICES = {
    "H200": Device(989e12, 141e9),
    "H100 PCIe": Device(756e12, 80e9),
    "H100": Device(989e12, 80e9),
    "H800": Device(989e12, 80e9),
    "A100 40GB": Device(312e12, 40e9),
    "A100": Device(312e12, 80e9),
    "A800": Device(312e12, 80e9),
    "L40S": Device(362e12, 48e9),
    "L4": Device(121e12, 24e9),
    "A10": Device(125e12, 24e9),
    "V100": Device(125e12, 32e9),
    "T4": Device(65e12, 16e9),
    "RTX 4090": Device(165e12, 24e9),
    "RTX 3090": Device(71e12, 24e9),
}
"""By a part of the device's name; the first that fits counts."""


def device_named(name: str) -> Device | None:
    """The device whose name holds one of those known."""
    return next((device for known, device in DEVICES.items() if known in name), None)
