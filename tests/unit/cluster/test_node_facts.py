"""What a node says of itself, and what differs between two that train together."""

import os
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from orchestrator.cluster.node_facts import Facts, facts_here, free_bytes, unlike

PLAIN = Facts(cpus=8, memory_bytes=32_000_000_000, disk_bytes=500_000_000_000)
EQUIPPED = replace(PLAIN, devices=("NVIDIA H100",) * 8, device_bytes=80 * 2**30, driver="570.1", nccl="2.28.3")


def nvidia_smi(folder: Path, output: str, code: int = 0) -> None:
    """A program of that name, which says what a driver's own would."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {code}\n", encoding="utf-8")
    program.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_devices_are_what_the_driver_says(programs: Path) -> None:
    nvidia_smi(programs, "NVIDIA H100 80GB HBM3, 81559, 570.86.15\nNVIDIA H100 80GB HBM3, 81000, 570.86.15")
    found = facts_here(programs)
    assert found.devices == ("NVIDIA H100 80GB HBM3",) * 2
    assert (found.device_bytes, found.driver) == (81000 * 2**20, "570.86.15")
    assert "2 x NVIDIA H100 80GB HBM3 (driver 570.86.15" in str(found)


def test_a_driver_that_does_not_answer_is_no_device(programs: Path) -> None:
    nvidia_smi(programs, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", code=9)
    assert facts_here(programs).devices == ()


def test_the_host_is_what_the_system_says(tmp_path: Path) -> None:
    found = facts_here(tmp_path / "not" / "there" / "yet")
    assert found.cpus == os.cpu_count()
    assert 0.5 * psutil.virtual_memory().available < found.memory_bytes <= psutil.virtual_memory().total
    assert found.disk_bytes == pytest.approx(free_bytes(tmp_path), rel=0.01)


def test_nodes_that_differ_are_named_with_what_both_have() -> None:
    older = replace(EQUIPPED, driver="550.4", nccl="2.27.1")
    found = unlike({"10.0.0.1": EQUIPPED, "10.0.0.2": EQUIPPED, "10.0.0.3": older, "10.0.0.4": PLAIN})
    assert found == [
        "node 10.0.0.3: its GPU driver is 550.4, that of 10.0.0.1 570.1; install the same",
        "node 10.0.0.3: its NCCL is 2.27.1, that of 10.0.0.1 2.28.3; install the same",
    ]
    # A head without a device takes no part in it.
    assert unlike({"10.0.0.4": PLAIN, "10.0.0.1": EQUIPPED}) == []
    assert unlike({}) == []
    assert unlike({"10.0.0.1": PLAIN, "10.0.0.2": replace(PLAIN, cpus=2)}) == []
