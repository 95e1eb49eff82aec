"""What a person reads in the terminal."""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as Terminal

from orchestrator.plan.plan import Contents, Plan, PlannedStage, State, make_plan
from orchestrator.plan.record import Record
from orchestrator.report.console import Console
from orchestrator.report.live import Seen, Watched
from orchestrator.report.preparing import PreparingLine
from orchestrator.report.words import duration, shown
from orchestrator.schema import Recipe
from tests.llama_layers import LAYERS

TRAIN = {"kind": "train", "block_length": 64, "global_batch_size": 16, "steps": 10, "learning_rate": 1e-4}
LORA = {"kind": "lora", "rank": 8, "alpha": 32, "targets": ["q_proj", "v_proj"]}
RECIPE = Recipe.model_validate(
    {
        "name": "laptop",
        "base_model": "/models/base",
        "stages": {
            "vocabulary": {"kind": "vocabulary"},
            "attention": TRAIN | {"objective": "next_token", "method": LORA, "modules_to_save": ["embed_tokens", "lm_head"]},
            "embeddings": TRAIN | {"objective": "next_token", "modules_to_save": ["embed_tokens"]},
            "export": {"kind": "export"},
        },
        "cluster": {"kind": "local"},
        "tracking": {"kind": "none"},
    }
)


class Screen:
    """A console, and what it has printed."""

    def __init__(self, *, is_terminal: bool = False) -> None:
        self._file = io.StringIO()
        self.console = Console(Terminal(file=self._file, width=160, force_terminal=is_terminal, color_system=None))

    @property
    def text(self) -> str:
        return self._file.getvalue()

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.text.splitlines()]


@pytest.fixture
def screen() -> Screen:
    return Screen()


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_plan(RECIPE, Contents("b" * 64, "c" * 64, {}, linear_layers=LAYERS), tmp_path)


def record(planned: PlannedStage, results: dict[str, Any]) -> Record:
    return Record(planned.name, planned.stage.kind, planned.fingerprint, planned.identity, planned.parents, {}, results, {})


def row(step: int, seconds: float = 2.0, loss: float = 3.14159) -> dict[str, Any]:
    return {"step": step, "loss": loss, "seconds": seconds, "tokens_per_second": 12345.6, "learning_rate": 1e-4}


def watched(num_steps: int, rows: Callable[[], list[dict[str, Any]]]) -> Watched:
    return Watched("laptop", [("attention", State.RUN)], "attention", num_steps, lambda: Seen(rows()))


def test_the_plan_says_what_learns_and_what_runs_and_why(screen: Screen, plan: Plan) -> None:
    stages = (
        replace(plan.stages[0], state=State.DONE, reason="its record is there"),
        replace(plan.stages[1], reason="learning_rate 0.1 → 0.2 (against attention-0123456789ab)"),
        replace(plan.stages[2], state=State.SKIP, reason="not asked for"),
        plan.stages[3],
    )
    screen.console.show_plan(RECIPE, Plan(stages))
    name, heading, *rows = screen.lines
    assert name == "laptop"
    assert heading.split() == ["stage", "what", "learns", "state", "why"]
    assert [[cell.strip() for cell in line.split("  ") if cell] for line in rows] == [
        ["0", "vocabulary", "nothing: merges a vocabulary (reachable)", "DONE", "its record is there"],
        [
            "1",
            "attention",
            "LoRA r8 on q, v + embed_tokens, lm_head",
            "RUN",
            "learning_rate 0.1 → 0.2 (against attention-0123456789ab)",
        ],
        ["2", "embeddings", "embed_tokens", "SKIP", "not asked for"],
        ["3", "export", "nothing: writes one adapter and the merged model", "RUN", "new"],
    ]


def test_brackets_in_values_and_paths_are_shown_and_are_no_markup(screen: Screen, plan: Plan) -> None:
    planned = replace(plan.stages[0], reason="pad_token [pad] → [/pad]", folder=Path("/runs/[bold]/vocabulary"))
    screen.console.show_plan(RECIPE, Plan((planned,)))
    screen.console.stage_begins(planned)
    screen.console.say("reading [dim]")
    screen.console.warn("see [/red]")
    assert screen.lines[-4].endswith("pad_token [pad] → [/pad]")
    assert screen.lines[-3:] == ["0 vocabulary → /runs/[bold]/vocabulary", "reading [dim]", "see [/red]"]


def test_training_without_a_terminal_prints_its_last_line_once(screen: Screen) -> None:
    rows = [row(step) for step in range(1, 41)]
    with screen.console.training(watched(100, lambda: rows)):
        pass
    assert screen.lines == ["  step 40/100  loss 3.142  12,346 tokens/s  2m00s left"]


def test_training_without_a_terminal_prints_no_step_twice(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.report.console._POLL_SECONDS", 0.001)
    monkeypatch.setattr("orchestrator.report.console._PLAIN_LINE_SECONDS", 0.0)
    rows = [row(1)]
    with screen.console.training(watched(100, lambda: rows)):
        time.sleep(0.05)
        rows.append(row(2))
        time.sleep(0.05)
    assert [line.split()[1] for line in screen.lines] == ["1/100", "2/100"]


def test_what_is_left_is_judged_by_the_last_ten_rows(screen: Screen) -> None:
    rows = [row(step, seconds=100.0) for step in range(1, 11)] + [row(step, seconds=1.0) for step in range(11, 21)]
    with screen.console.training(watched(1000, lambda: rows)):
        pass
    assert screen.lines == ["  step 20/1,000  loss 3.142  12,346 tokens/s  16m20s left"]


def test_training_that_has_logged_nothing_prints_nothing(screen: Screen) -> None:
    with screen.console.training(watched(100, list)):
        pass
    assert screen.text == ""


def test_the_line_ends_with_the_training_also_when_it_fails(screen: Screen) -> None:
    with pytest.raises(KeyError), screen.console.training(watched(100, lambda: [row(7)])):
        raise KeyError("a worker died")
    assert screen.lines == ["  step 7/100  loss 3.142  12,346 tokens/s  3m06s left"]


def test_on_a_terminal_a_view_moves_and_one_line_stays() -> None:
    screen, rows = Screen(is_terminal=True), []
    with screen.console.training(watched(100, lambda: rows)):
        deadline = time.monotonic() + 10
        while "starting workers" not in screen.text and time.monotonic() < deadline:
            time.sleep(0.01)
        rows.append(row(1))
        while "step 1 of 100" not in screen.text and time.monotonic() < deadline:
            time.sleep(0.01)
        rows.append(row(2, loss=2.5))
    assert "starting workers" in screen.text
    assert "loss 3.142" in screen.text
    assert screen.text.rstrip().endswith("step 2/100  loss 2.500  12,346 tokens/s  3m16s left")


def test_a_trained_stage_says_how_much_it_trained_and_what_it_changed(screen: Screen, plan: Plan) -> None:
    bits = {"before": {"bits_per_character": 4.0}, "after": {"bits_per_character": 2.5}}
    results = {
        "trainable": 12_345,
        "parameters": 1_000_000,
        "held_out": {"validation": bits},
        "reference": {"validation": {"bits_per_character": 5.0}},
        "checkpoint_bytes": 148_140,
        "step": {
            "seconds": 2.0,
            "reading_seconds": 0.001,
            "forward_seconds": 0.6,
            "backward_seconds": 1.2,
            "optimizer_seconds": 0.1,
            "other_seconds": 0.099,
            "flops_utilisation": 0.42,
        },
        "history": {
            "attempts": 3,
            "failures": {"worker_lost": 1, "preemption": 1},
            "lost_steps": 14,
            "recovery_seconds": [4.0, 9.0],
            "goodput": 0.91,
        },
        "seconds": 3725.0,
    }
    screen.console.stage_ends(plan.named("attention"), record(plan.named("attention"), results))
    assert screen.lines == [
        "  trained 12,345 of 1,000,000 parameters (1.23%)",
        "  validation: 4.000 → 2.500 bits per character (base 5.000)",
        "  a step took 2s: backward 60%, forward 30%, optimizer 5%, other 5%; 42% of the devices' peak",
        "  checkpoints of 148.1 kB; with the whole model in them 12.0 MB",
        "  3 attempts: 1 worker lost, 1 preemption; 14 steps again; recovery 6 s (longest 9 s); goodput 91 %",
        "  done in 1h02m",
    ]


def test_a_stage_to_which_nothing_happened_says_nothing_of_it(screen: Screen, plan: Plan) -> None:
    quiet = {"attempts": 1, "failures": {}, "lost_steps": 0, "recovery_seconds": [], "goodput": 0.8}
    results = {"trainable": 1, "parameters": 2, "held_out": {}, "checkpoint_bytes": 0, "history": quiet, "seconds": 1.0}
    screen.console.stage_ends(plan.named("attention"), record(plan.named("attention"), results))
    assert screen.lines == ["  trained 1 of 2 parameters (50.00%)", "  done in 1s"]


def test_a_vocabulary_stage_says_what_was_added_and_what_it_saves(screen: Screen, plan: Plan) -> None:
    results = {
        "base_tokens": 32000,
        "added_tokens": 17953,
        "tokens": 49953,
        "rows": 49984,
        "dropped_pieces": {"already_there": 12},
        "compression": {"new_language": {"tokens_per_character_before": 1.5, "tokens_per_character_after": 0.625}},
        "seconds": 61.0,
    }
    screen.console.stage_ends(plan.named("vocabulary"), record(plan.named("vocabulary"), results))
    assert screen.lines == [
        "  32,000 tokens + 17,953 new = 49,953, in 49,984 rows",
        "  left out: 12 already there",
        "  new language: 1.500 → 0.625 tokens per character",
        "  done in 1m01s",
    ]


def test_an_export_says_how_well_its_two_forms_agree(screen: Screen, plan: Plan) -> None:
    export = plan.named("export")
    screen.console.stage_ends(export, record(export, {"merged_logit_difference": 0.00123, "seconds": 1.0}))
    assert screen.lines[0] == "  merged and adapter agree: logits differ by at most 0.0012 of the largest"


def test_the_results_of_finished_stages_are_listed_by_path(screen: Screen, plan: Plan) -> None:
    for name, folders in (("vocabulary", ["base", "tokenizer", "work"]), ("attention", ["adapter"])):
        for folder in folders:
            (plan.named(name).folder / folder).mkdir(parents=True)
    done = tuple(replace(planned, state=State.DONE if planned.number != 1 else State.RUN) for planned in plan.stages)
    screen.console.show_results(plan)
    assert screen.text == ""
    screen.console.show_results(Plan(done))
    folder = plan.named("vocabulary").folder
    assert screen.lines == ["results", f"  vocabulary   {folder / 'tokenizer'}", f"  vocabulary   {folder / 'base'}"]


def test_an_error_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().console.fail("stages.[x]: no such key")
    printed = capsys.readouterr()
    assert printed.err.strip() == "stages.[x]: no such key"
    assert printed.out == ""


def test_a_path_below_here_is_shown_as_a_person_would_type_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown(Path.cwd() / "runs" / "a") == "runs/a"
    assert shown(Path("/elsewhere/runs")) == "/elsewhere/runs"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599.4, "59m59s"), (3600, "1h00m"), (90_061, "25h01m")],
)
def test_a_duration_is_as_exact_as_a_person_cares(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@dataclass
class Found:
    """What is told of a preparation."""

    bytes: int
    total_bytes: int
    documents: int
    tokens: int


def test_the_line_of_a_preparation_says_how_much_how_fast_and_how_long_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([None, Found(0, 400, 0, 0), Found(100, 400, 1_000, 5_000), Found(200, 400, 2_000, 9_000)])
    now = iter([10.0, 20.0, 30.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    line = PreparingLine(lambda: next(told))
    assert line() is None
    assert line() == f"{'╌' * 24}   0%  0 documents, 0 tokens"
    assert line() == f"{'━' * 6}{'╌' * 18}  25%  1,000 documents, 5,000 tokens  500 tokens/s  30s left"
    assert line() == f"{'━' * 12}{'╌' * 12}  50%  2,000 documents, 9,000 tokens  450 tokens/s  20s left"


def test_a_preparation_that_goes_on_counts_its_own_pace_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([Found(300, 400, 3, 30), Found(350, 400, 4, 35)])
    now = iter([0.0, 5.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    line = PreparingLine(lambda: next(told))
    line()
    assert str(line()).endswith("1 tokens/s  5s left")


def test_a_preparation_is_watched_until_it_is_over(screen: Screen) -> None:
    with screen.console.preparing(lambda: Found(400, 400, 7, 70)):
        pass
    assert screen.lines == [f"  {'━' * 24} 100%  7 documents, 70 tokens"]


def test_what_learns_is_shown_by_kind_and_the_rest_in_a_line(screen: Screen) -> None:
    screen.console.show_learning({"embed_tokens": (0, 5_000), "q_proj": (200, 1_200), "norm": (0, 16)})
    assert [line.split() for line in screen.lines[-3:]] == [
        ["learns", "parameters", "of"],
        ["q_proj", "200", "1,200"],
        ["all", "else", "is", "frozen", "5,016"],
    ]
