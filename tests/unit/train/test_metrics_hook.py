"""A row of metrics says what a step was, where its time went, and what share of the devices it used."""

import time
from pathlib import Path

import pytest

from orchestrator.engine import StepResult
from orchestrator.model.flops import StepFlops
from orchestrator.schema import NoTracking
from orchestrator.tracking import MetricsFile, RunDescription, start_mirror
from orchestrator.tracking.metrics import read_metrics
from orchestrator.train.loop import Progress
from orchestrator.train.metrics_hook import MetricsHook, Utilisation

UTILISATION = Utilisation(StepFlops(body=100.0, attention=2.0, head=50.0), seen=10.0, peak=1e5)
STEP = StepResult(
    loss=2.5,
    gradient_norm=0.5,
    learning_rate=1e-3,
    num_tokens=30,
    num_targets=20,
    seconds={"reading": 0.0, "forward": 0.001, "backward": 0.002},
)


def rows(folder: Path, every_steps: int) -> list[dict]:
    with MetricsFile(folder / "metrics.jsonl") as file:
        hook = MetricsHook(
            file,
            start_mirror(NoTracking(kind="none"), RunDescription("a", "a", "a", "train", (), {}, folder)),
            every_steps,
            num_steps=4,
            utilisation=UTILISATION,
        )
        for step in range(1, 5):
            time.sleep(0.01)
            hook.after_step(Progress(step, 30 * step), STEP)
    return read_metrics(folder / "metrics.jsonl")


def test_utilisation_is_the_models_operations_in_the_devices_peak() -> None:
    # 30 tokens of 100 + 2 x 10, 20 targets of 50: 4,600 operations, in half a second.
    assert UTILISATION.of(30, 20, 0.5) == pytest.approx(4600 / 0.5 / 1e5)


@pytest.mark.parametrize("every_steps", [1, 2])
def test_a_row_has_means_of_its_steps_and_the_rest_is_other(tmp_path: Path, every_steps: int) -> None:
    found = rows(tmp_path, every_steps)
    assert [row["step"] for row in found] == list(range(every_steps, 5, every_steps))
    for row in found:
        assert row["forward_seconds"] == pytest.approx(0.001)
        assert row["backward_seconds"] == pytest.approx(0.002)
        spent = sum(value for name, value in row.items() if name.endswith("_seconds"))
        assert spent == pytest.approx(row["seconds"])
        assert row["other_seconds"] >= 0.006
        assert row["flops_utilisation"] == pytest.approx(UTILISATION.of(30, 20, row["seconds"]), rel=1e-6)
