"""What a node has to train with: cores, memory, disk, and its devices with their driver and NCCL."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import psutil

_SMI = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
_SMI_SECONDS = 20


@dataclass(frozen=True)
class Facts:
    """Of one node, at this moment."""

    cpus: int
    memory_bytes: int
    """Of the host, that nobody uses."""
    disk_bytes: int
    """Free where the run root lies."""
    devices: tuple[str, ...] = ()
    """Names of the accelerators."""
    device_bytes: int = 0
    """Memory of the smallest."""
    driver: str = ""
    nccl: str = ""
    counted: int = 0
    """GPUs that Ray counts there."""

    def __str__(self) -> str:
        free = (
            f"{self.cpus} CPUs, {self.memory_bytes / 1e9:.1f} GB of memory and {self.disk_bytes / 1e9:.1f} GB of disk free"
        )
        if not self.devices:
            return f"{free}, no GPU"
        return f"{free}, {len(self.devices)} x {self.devices[0]} (driver {self.driver}, NCCL {self.nccl})"


def facts_here(run_root: Path) -> Facts:
    """Of this machine."""
    names, memories, drivers = [], [], []
    for line in _smi().splitlines():
        name, memory, driver = (part.strip() for part in line.split(","))
        names.append(name)
        memories.append(int(memory) * 2**20)
        drivers.append(driver)
    return Facts(
        cpus=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().available,
        disk_bytes=free_bytes(run_root),
        devices=tuple(names),
        device_bytes=min(memories, default=0),
        driver=next(iter(drivers), ""),
        nccl=_nccl() if names else "",
    )


def free_bytes(folder: Path) -> int:
    """On the disk that a folder lies on, or will."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def unlike(facts: dict[str, Facts]) -> list[str]:
    """What differs between nodes whose devices train together; a line for each that is not as the first. A head without a
    device takes no part in that."""
    first, *others = [node for node, each in facts.items() if each.devices] or [""]
    found = []
    for node in others:
        for what in ("driver", "nccl"):
            here, there = getattr(facts[first], what), getattr(facts[node], what)
            if here != there:
                name = {"driver": "GPU driver", "nccl": "NCCL"}[what]
                found.append(
                    f"node {node}: its {name} is {there or 'none'}, that of {first} {here or 'none'}; install the same"
                )
    return found


def _smi() -> str:
    if not shutil.which(_SMI[0]):
        return ""
    told = subprocess.run(_SMI, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    return told.stdout if told.returncode == 0 else ""


def _nccl() -> str:
    found = [each for each in distributions() if (each.metadata["Name"] or "").startswith("nvidia-nccl")]
    return found[0].version if found else "none"
