"""This project's code on the nodes of a cluster: sent there, or seen to be the same, and never taken for granted."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from orchestrator.store import sha256_text

_PROJECT = Path(__file__).resolve().parents[2]
_SENT = ("orchestrator", "recipes")
"""The code, and the sample texts that a recipe may name."""


@contextmanager
def staged() -> Iterator[str]:
    """A folder of what is sent, and nothing else that may lie beside it in a checkout."""
    with TemporaryDirectory(prefix="orchestrator-code-") as folder:
        for name in _SENT:
            shutil.copytree(_PROJECT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        yield folder


@cache
def code_hash() -> str:
    """sha256 over the names and contents of this project's modules, as they lie on this machine."""
    files = sorted((_PROJECT / "orchestrator").rglob("*.py"))
    return sha256_text("\n".join(f"{file.relative_to(_PROJECT)}\n{file.read_text(encoding='utf-8')}" for file in files))
