"""A Ray cluster of several nodes on this machine, as a user sees it who has its address."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.command import command_environment

_SCRIPT = Path(__file__).with_name("cluster_process.py")

needs_namespaces = pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode != 0, reason="no namespaces here"
)


class Nodes:
    """Nodes with one CPU each, and a head with none."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address = self._answer()

    def add(self) -> str:
        """The address of a new node."""
        return self._ask("add")

    def remove(self, address: str) -> None:
        """As if its power were cut: its raylet and all its processes are killed."""
        assert self._ask(f"remove {address}") == "removed"

    def drain(self, address: str, seconds: float) -> None:
        """A preemption notice."""
        assert self._ask(f"drain {address} {seconds}") == "draining"

    def leave(self, seconds: float) -> None:
        """As the machine does that they are on, before it goes; returns once nothing trains there."""
        assert self._ask(f"leave {seconds}") == "left"

    def _ask(self, line: str) -> str:
        assert self._process.stdin
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout
        for line in self._process.stdout:
            # Ray also prints there.
            if line.startswith(("127.", "removed", "draining", "left")) or line.strip().rpartition(":")[2].isdecimal():
                return line.strip()
        raise AssertionError("the cluster ended")


@contextmanager
def cluster_of(
    home: Path, number: int = 0, covered: Path | None = None, apart: bool = False, client_port: int | None = None
) -> Iterator[Nodes]:
    """So many nodes for the length of a `with`, of a user whose home is `home`.

    Where a folder is `covered`, they see another file system in its place; `apart`, they see their own processes only.
    With a `client_port`, Ray Client's server is there.
    """
    command = [sys.executable, str(_SCRIPT), *([str(client_port)] if client_port else [])]
    if apart:
        command = ["unshare", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child", *command]
    if covered:
        command = ["unshare", "-rm", "bash", "-c", f"mount -t tmpfs tmpfs {covered} && exec {sys.executable} {_SCRIPT}"]
    with tempfile.TemporaryDirectory(prefix="nodes-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        (Path(temporary) / "ray").mkdir()
        process = subprocess.Popen(
            command,
            env=command_environment(home) | {"RAY_TMPDIR": temporary},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(home / "cluster.log").open("w"),
            text=True,
        )
        try:
            nodes = Nodes(process)
            for _ in range(number):
                nodes.add()
            yield nodes
        finally:
            assert process.stdin
            process.stdin.close()
            process.wait(60)
