"""The project's command as a user types it, in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.shared_data import ROOT


def run_command(
    words: Sequence[str], folder: Path, seconds: float = 600, more: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python launch/run.py …`, typed in `folder`, without a terminal or any login, in its environment and `more`."""
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "run.py"), *words],
        cwd=folder,
        env=command_environment(folder) | dict(more or {}),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def command_environment(folder: Path) -> dict[str, str]:
    """That of a user whose home is `folder`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "HF_", "RAY_"))}
    environment |= {"HOME": str(folder), "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    # The compiled op and the hashes are kept between runs, as on a user's machine.
    environment.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "torch_extensions"))
    return environment
