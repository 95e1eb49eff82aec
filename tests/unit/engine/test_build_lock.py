"""A process that is killed while it builds a torch extension does not make the others wait for ever."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from orchestrator.engine.build_lock import TORCH_LOCK, building

BUILD_AS_TORCH_DOES = """
import sys, time
from pathlib import Path
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("building", flush=True)
time.sleep(600)
"""
BUILD_ALONE = """
import sys, time
from pathlib import Path
from orchestrator.engine.build_lock import building
with building(Path(sys.argv[1])):
    print("building", flush=True)
    time.sleep(1)
    (Path(sys.argv[1]) / "built").touch()
"""
BUILD_OP = "import torch, orchestrator.engine.engine as engine; engine._build_op()"


@contextmanager
def process(code: str, argument: Path) -> Iterator[subprocess.Popen[str]]:
    """One that says that it builds."""
    child = subprocess.Popen([sys.executable, "-c", code, str(argument)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout
        assert child.stdout.readline() == "building\n"
        yield child
    finally:
        child.kill()
        child.wait()


def test_the_lock_of_a_builder_that_was_killed_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with process(BUILD_AS_TORCH_DOES, tmp_path / TORCH_LOCK):
        pass
    assert (tmp_path / TORCH_LOCK).exists()
    with building(tmp_path):
        assert FileBaton(str(tmp_path / TORCH_LOCK)).try_acquire()
    assert "left by a process that was killed" in capsys.readouterr().out


def test_the_lock_of_a_builder_that_lives_is_left_alone(tmp_path: Path) -> None:
    with process(BUILD_AS_TORCH_DOES, tmp_path / TORCH_LOCK), building(tmp_path):
        assert not FileBaton(str(tmp_path / TORCH_LOCK)).try_acquire()


def test_two_build_one_after_the_other(tmp_path: Path) -> None:
    with process(BUILD_ALONE, tmp_path), building(tmp_path):
        assert (tmp_path / "built").exists()


@pytest.mark.slow
def test_deepspeeds_op_is_built_after_a_builder_was_killed(tmp_path: Path) -> None:
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    killed = subprocess.Popen([sys.executable, "-c", BUILD_OP], env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(f"*/{TORCH_LOCK}")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # With the compilers that it has started.
    os.killpg(killed.pid, 9)
    killed.wait()
    subprocess.run([sys.executable, "-c", BUILD_OP], env=environment, check=True, timeout=200)
    assert not list(tmp_path.glob(f"*/{TORCH_LOCK}"))
    assert list(tmp_path.glob("*/*.so"))
