"""For tests of what may happen to a run: a small stage, a run of it that nothing happened to, copies of what is before."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.store import sha256_file
from tests.faults.running import WORDS, Undisturbed, running
from tests.integration.command import run_command

Measure = Callable[[str, float], None]
_FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> Measure:
    """Notes how many seconds something took; all of it is shown at the end of the run."""
    figures = request.config.stash.setdefault(_FIGURES, [])
    return lambda what, seconds: figures.append(f"{seconds:6.1f} s  {what}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What measures seconds against a promise runs alone; before the tests of a run are chosen by their marks."""
    for item in items:
        if "measure" in getattr(item, "fixturenames", ()):
            item.add_marker("timed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if figures := config.stash.get(_FIGURES, []):
        terminalreporter.section("measured")
        terminalreporter.write("\n".join(figures) + "\n")


@pytest.fixture(scope="session")
def prepared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose `runs` holds the stage before, done."""
    folder = tmp_path_factory.mktemp("prepared")
    completed = run_command(["stage=0", "tracking=none"], folder)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return folder


@pytest.fixture
def folder(prepared_root: Path, tmp_path: Path) -> Path:
    """A copy of that for a test to do its worst in."""
    return _copy(prepared_root, tmp_path)


@pytest.fixture
def other_folder(prepared_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another copy."""
    return _copy(prepared_root, tmp_path_factory.mktemp("other"))


def _copy(prepared_root: Path, folder: Path) -> Path:
    shutil.copytree(prepared_root / "runs", folder / "runs", ignore=shutil.ignore_patterns("embeddings-*"))
    return folder


@pytest.fixture(scope="session")
def undisturbed(prepared_root: Path) -> Undisturbed:
    with running(WORDS, prepared_root) as command:
        assert command.wait() == 0, command.output
        return Undisturbed(command.losses(), sha256_file(command.stage / "adapter" / "adapter_model.safetensors"))
