"""What happened to a stage is told afterwards: in its record, on the screen, and in wandb."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.faults.running import SAVE_EVERY, WORDS, running
from tests.wandb_reader import read_offline_runs

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_failure_is_told_in_the_record_on_the_screen_and_in_wandb(folder: Path) -> None:
    words = ["tracking=wandb" if word == "tracking=none" else word for word in WORDS]
    with running(words, folder) as command:
        command.wait_for_step(2 * SAVE_EVERY + 2)
        os.kill(command.rank_pid(1), signal.SIGKILL)
        assert command.wait() == 0, command.output
        results = json.loads((command.stage / "record.json").read_text(encoding="utf-8"))["results"]
        history = results["history"]
        assert (history["commands"], history["attempts"], history["failures"]) == (1, 2, {"worker_lost": 1})
        assert 0 < history["lost_steps"] <= 2 * SAVE_EVERY
        assert len(history["recovery_seconds"]) == 1
        assert 0 < history["goodput"] < 1
        assert "2 attempts: 1 worker lost; " in command.output
        assert results["checkpoint_bytes"] > 0
        assert "with the whole model in them" in command.output
        runs = read_offline_runs(command.stage)
        # Of a run that was killed wandb may have written nothing yet, not even its name.
        assert {run.id for run in runs if "run" in run.kinds} == {command.stage.name}
        (ended,) = [run for run in runs if "ledger" in run.summary]
        assert ended.summary["ledger"]["failures"] == {"worker_lost": 1}
        assert ended.summary["ledger"]["lost_steps"] == history["lost_steps"]
        losses = dict(command.losses())
        assert {row["step"]: row["loss"] for row in ended.history} == {
            step: losses[step] for step in losses if step >= ended.history[0]["step"]
        }
