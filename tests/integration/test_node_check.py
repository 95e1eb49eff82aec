"""What a node lacks is said before anything trains, and which node it is. And a node has the command's code, not its own."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.nodes import Nodes, cluster_of, needs_namespaces
from tests.integration.command import command_environment, run_command
from tests.shared_data import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

NODES = ("127.0.0.2", "127.0.0.3")


def words(nodes: Nodes, *more: str) -> list[str]:
    return ["stage=0", "tracking=none", "cluster=address", f"cluster.address={nodes.address}", *more]


@needs_namespaces
def test_nodes_that_see_another_run_root_and_other_data_are_named(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "corpus.txt").write_text("text\n" * 1000, encoding="utf-8")
    with cluster_of(tmp_path, 2, covered=tmp_path / "runs") as nodes:
        completed = run_command(words(nodes, "text=runs/corpus.txt"), tmp_path)
    assert completed.returncode == 75
    for node in NODES:
        assert f"node {node}: run_root: {tmp_path}/runs is not the folder that this command sees" in completed.stderr
        assert f"node {node}: cannot read {tmp_path}/runs/corpus.txt" in completed.stderr
    assert "Traceback" not in completed.stderr
    assert not list((tmp_path / "runs").glob("vocabulary-*"))
    assert not list((tmp_path / "runs").glob(".probe-*"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """This project once more, with a change: nodes have it without."""
    copy = tmp_path / "project"
    for name in ("orchestrator", "recipes", "launch"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    body = copy / "orchestrator" / "stages" / "vocabulary.py"
    text = body.read_text(encoding="utf-8")
    assert '"""' in text
    changed = f'{text}\n\nPath("{tmp_path}/code-of-the-command").touch()\n'
    body.write_text(changed, encoding="utf-8")
    return copy


def run(project: Path, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(project / "launch" / "run.py"), *arguments]
    environment = command_environment(folder)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False)


@needs_namespaces
def test_the_commands_own_code_runs_on_the_nodes(project: Path, tmp_path: Path) -> None:
    """They do not see its folder, and have what is installed there."""
    with cluster_of(tmp_path, 1, covered=project) as nodes:
        refused = run(project, words(nodes, "cluster.code=installed"), tmp_path)
        assert refused.returncode == 75
        assert re.search(r"node 127\.0\.0\.2: its code \(.*\) is not this command's; install the same", refused.stderr)
        assert not (tmp_path / "code-of-the-command").exists()
        completed = run(project, words(nodes), tmp_path)
        assert completed.returncode == 0, completed.stdout + completed.stderr
        assert (tmp_path / "code-of-the-command").exists()
