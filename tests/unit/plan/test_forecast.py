"""What a recipe will take, by the command that says so, without weights, data or torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.compose import compose
from orchestrator.plan.forecast import Wanted, forecast
from tests.shared_data import ROOT


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "plan.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def found(*words: str) -> dict[str, Any]:
    done = run(*words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    return [f"run_root={tmp_path}/runs"]


def test_a_base_that_is_not_here_is_planned_by_its_sizes(small: list[str]) -> None:
    plan = found("scale=7b", *small, "--device", "H100", "--workers", "8", "--price", "2")
    assert [stage["name"] for stage in plan["stages"]] == ["embeddings", "attention", "instruct"]
    assert any("huggyllama/llama-7b is no local folder" in line for line in plan["missing"])
    attention = plan["stages"][1]
    assert "state" not in attention
    assert not attention["is_exact"]
    assert attention["tokens"] == 6000 * 1024 * 512
    # 4 operations a token and frozen weight, and as much again for the second forward of checkpointing.
    assert attention["step_flops"] == pytest.approx(6 * 6.9e9 * 1024 * 512, rel=0.05)
    assert attention["hours"] == pytest.approx(6000 * attention["step_flops"] / (8 * 989e12 * 0.4) / 3600)
    assert attention["price"] == pytest.approx(attention["hours"] * 8 * 2)
    assert attention["memory"]["2"]["total"] < 80e9 < 10 * attention["memory"]["2"]["total"]


def test_what_is_done_is_known_where_base_and_data_are_here(small: list[str]) -> None:
    plan = found("stage=2", *small)
    assert plan["missing"] == []
    assert [(stage["name"], stage["state"]) for stage in plan["stages"]] == [
        ("embeddings", "RUN"),
        ("attention", "RUN"),
        ("instruct", "SKIP"),
    ]
    done = run("stage=2", *small)
    assert "2 attention: RUN  new" in done.stdout
    assert "ZeRO-2 *" in done.stdout
    assert "hours" not in done.stdout


def test_a_device_that_is_too_small_is_told(small: list[str]) -> None:
    done = run("scale=7b", "zero=0", *small, "--device", "T4")
    assert "learns up to 213,123,072 of" in done.stdout
    assert "does not fit T4 with ZeRO-0, not even one sequence at once" in done.stdout


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("base_model=someone/else",), "base_model: someone/else is not here and its sizes are not known"),
        (("stage=9",), "stage"),
        (("recipe=chinese_lama",), "did you mean chinese_llama"),
    ],
)
def test_what_cannot_be_planned_is_named(words: tuple[str, ...], problem: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert problem in done.stderr


def test_planning_loads_no_torch(small: list[str]) -> None:
    forecast(compose([*small]), Wanted())
    code = (
        "import sys; from orchestrator.compose import compose; from orchestrator.plan.forecast import Wanted, forecast; "
        f"forecast(compose([{small[0]!r}]), Wanted('A100', 4)); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("word", ["--workers=0", "--workers=two", "--efficiency=0", "--efficiency=1.5", "--efficiency=most"])
def test_numbers_that_make_no_sense_are_refused(small: list[str], word: str) -> None:
    done = run(*small, word)
    assert done.returncode == 2
    assert word.partition("=")[2] in done.stderr.splitlines()[-1]
    assert "give" in done.stderr.splitlines()[-1]
