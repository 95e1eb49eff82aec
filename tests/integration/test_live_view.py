"""In a terminal the command shows a view that moves; with `ui=plain` it does not."""

import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.integration.command import command_environment
from tests.shared_data import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow]

WORDS = ["stage=1", "tracking=none", "workers=2", "stages.embeddings.steps=30", "evaluation.every_steps=10"]


def in_a_terminal(words: list[str], folder: Path) -> str:
    """All that the command writes to its terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "launch" / "run.py"), *words]
    environment = command_environment(folder) | {"TERM": "xterm-256color"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(ours, 1 << 16):
                written.append(part)
        except OSError:
            # Linux says so once nobody has the other side open.
            return

    reader = threading.Thread(target=read)
    reader.start()
    assert process.wait(180) == 0, b"".join(written).decode(errors="replace")
    reader.join(20)
    os.close(ours)
    return b"".join(written).decode()


def test_the_view_moves_in_a_terminal(folder: Path) -> None:
    shown = in_a_terminal(WORDS, folder)
    assert "✓ vocabulary" in shown
    assert "▶ embeddings" in shown
    assert "of 30" in shown
    assert "bits per byte at step" in shown
    # What it drew is gone at the end, but for its last line.
    assert "step 30/30" in shown
    assert "trained " in shown.rpartition("step 30/30")[2]


def test_plain_lines_are_to_be_had_there_too(folder: Path) -> None:
    shown = in_a_terminal([*WORDS, "ui=plain"], folder)
    assert "▶" not in shown
    assert "step 30/30" in shown
