"""Data prepared by real Ray Data: the same bytes as in one process, also when everything is killed on the way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.data.prepare import preparation_progress, prepare
from tests.integration.command import command_environment
from tests.integration.prepare_alone import preparation_of
from tests.shared_data import ROOT, SHARED

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
TOKENIZER = str(SHARED / "stories260k")
FILES = [str(SHARED / "text" / name) for name in ("luxun_train.jsonl", "english_wikipedia_30.txt")]


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.integration.prepare_alone", str(folder), TOKENIZER, *FILES]
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=command_environment(folder), stdout=output, stderr=output, start_new_session=True
        )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_killed_halfway_it_goes_on_and_gives_the_bytes_of_one_process(tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}")
    preparation = preparation_of(TOKENIZER, FILES)
    process = start(tmp_path)
    until = time.monotonic() + 120
    while (progress := preparation_progress(preparation, tmp_path)) is None or progress.bytes < progress.total_bytes / 3:
        assert process.poll() is None, (tmp_path / "output.txt").read_text()
        assert time.monotonic() < until, "nothing was prepared in two minutes"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    progress = preparation_progress(preparation, tmp_path)
    assert progress is not None
    assert 0 < progress.bytes < progress.total_bytes
    began = time.time()
    second = start(tmp_path)
    assert second.wait(200) == 0, (tmp_path / "output.txt").read_text()
    (folder,) = tmp_path.glob("data-*")
    assert contents(folder) == contents(prepare(preparation, tmp_path / "alone"))
    assert not list(tmp_path.glob(".data-*"))
    assert (folder / "data.json").stat().st_mtime > began
