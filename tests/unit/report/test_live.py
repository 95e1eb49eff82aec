"""The view that changes while a stage trains."""

import io
import time
from typing import Any

import pytest
from rich.console import Console as Terminal

from orchestrator.plan.plan import State
from orchestrator.report.console import Console
from orchestrator.report.live import Seen, Watched, live_view, progress_line


def row(step: int, loss: float = 3.0) -> dict[str, Any]:
    numbers = {"tokens_per_second": 1000.0, "learning_rate": 1e-4, "flops_utilisation": 0.37}
    return {"step": step, "loss": loss, "seconds": 2.0, **numbers}


def events(attempts: int, saved: int | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"event": "attempt", "time": time.time()}] * attempts
    return found + ([{"event": "checkpoint", "step": saved, "time": time.time() - 65}] if saved else [])


MEASURED = [
    {
        "step": 20,
        "held_out": {"validation": {"bits_per_byte": 1.234}},
        "samples": [{"prompt": "从前", "text": "有一只[猫]\n很黑"}],
    }
]


def shown(seen: Seen, num_steps: int = 100) -> str:
    terminal = Terminal(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    stages = [("vocabulary", State.DONE), ("attention", State.RUN), ("export", State.SKIP)]
    terminal.print(live_view(Watched("my_recipe", stages, "attention", num_steps, lambda: seen)))
    file = terminal.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_it_shows_pipeline_step_numbers_checkpoint_restarts_and_samples() -> None:
    rows = [row(step, 5 - step / 20) for step in range(1, 41)]
    text = shown(Seen(rows, events(3, saved=30), MEASURED))
    for said in (
        "my_recipe",
        "✓ vocabulary",
        "▶ attention",
        "– export",
        "step 40 of 100",
        "loss 3.000",
        "1,000 tokens/s",
        "37% of peak",
        "2m00s left",
        "checkpoint of step 30, 1m05s ago",
        "2 restarts",
        "bits per byte at step 20: validation 1.234",
        "从前 → 有一只[猫] 很黑",
    ):
        assert said in text, said


def test_the_curve_of_the_loss_falls_with_it() -> None:
    text = shown(Seen([row(step, 5 - step / 20) for step in range(1, 41)], events(1)))
    (curve,) = (line for line in text.splitlines() if "█" in line)
    bars = [character for character in curve if character in "▁▂▃▄▅▆▇█"]
    assert len(bars) == 40
    assert bars == sorted(bars, reverse=True)


@pytest.mark.parametrize(
    ("told", "said"),
    [([], "starting workers"), (events(1), "loading the model"), ([*events(1), {"event": "learns"}], "first step")],
)
def test_before_the_first_step_it_says_what_is_done(told: list[dict[str, Any]], said: str) -> None:
    assert said in shown(Seen((), told))


def test_a_loss_that_is_no_number_does_not_end_the_view() -> None:
    assert "loss nan" in shown(Seen([row(1, float("nan")), row(2, float("nan"))], events(1)))


def test_the_plain_line_says_the_same_in_one() -> None:
    line = progress_line(Seen([row(40)], events(1), MEASURED), 100)
    assert line == "step 40/100  loss 3.000  1,000 tokens/s  2m00s left  bits per byte at step 20: validation 1.234"


def test_plain_lines_can_be_asked_for_in_a_terminal() -> None:
    file = io.StringIO()
    console = Console(Terminal(file=file, width=120, force_terminal=True, color_system=None), is_plain=True)
    with console.training(Watched("r", [("a", State.RUN)], "a", 10, lambda: Seen([row(4)], events(1)))):
        pass
    assert file.getvalue() == "  step 4/10  loss 3.000  1,000 tokens/s  12s left\n"


def test_the_view_leaves_its_last_line_and_nothing_else() -> None:
    file = io.StringIO()
    console = Console(Terminal(file=file, width=120, force_terminal=True, color_system=None))
    with console.training(Watched("r", [("a", State.RUN)], "a", 10, lambda: Seen([row(4)], events(1)))):
        console.warn("a worker was lost")
    text = file.getvalue()
    assert "a worker was lost" in text
    assert text.rstrip().endswith("step 4/10  loss 3.000  1,000 tokens/s  12s left")
