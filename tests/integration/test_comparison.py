"""One command trains a stage in several ways, and says what each costs and brings."""

import json
from pathlib import Path

import pytest

from tests.integration.command import run_command
from tests.shared_data import SHARED, needs

pytestmark = [pytest.mark.ray, pytest.mark.slow, needs("stories260k", "instructions/alpaca_en_demo.json")]

WORDS = [
    "recipe=method_comparison",
    f"base_model={SHARED}/stories260k",
    "~compare.methods",
    "compare.methods={lora: {learning_rate: 1e-2}, full: {method: full}, prompt: {method: prompt_tuning}}",
    "compare.methods.bottleneck={method: bottleneck}",
    "compare.seeds=[1,2]",
    "compare.latency_tokens=4",
    "stages.task.steps=3",
    "retention=null",
    "validation=null",
    "workers=2",
    "tracking=none",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparison")


def test_a_comparison_ends_in_a_table_and_a_plot_and_is_not_trained_again(folder: Path) -> None:
    completed = run_command(WORDS, folder, seconds=400)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    (made,) = (folder / "runs").glob("comparison-*")
    lines = (made / "table.md").read_text(encoding="utf-8").splitlines()
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in lines[2:]}
    assert list(cells) == ["the base", "lora", "full", "prompt", "bottleneck"]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "runs").glob("task-*/record.json")]
    assert len(records) == 4 * 2
    before = float(cells["the base"][1])
    for name in ("lora", "full", "prompt", "bottleneck"):
        of_it = [each["results"] for each in records if each["identity"]["stage"]["method"]["kind"].startswith(name)]
        mean = sum(each["held_out"]["instructions"]["after"]["bits_per_character"] for each in of_it) / 2
        assert cells[name][1].startswith(f"{mean:.3f} ± ")
        assert {round(each["held_out"]["instructions"]["before"]["bits_per_character"], 3) for each in of_it} == {before}
        assert float(cells[name][5]) > 0
    assert float(cells["lora"][6]) > 0
    assert (cells["full"][6], cells["prompt"][6], cells["bottleneck"][6]) == ("", "cannot be", "cannot be")
    assert (made / "comparison.svg").stat().st_size > 5000
    again = run_command(WORDS, folder, seconds=100)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing to run" in again.stdout
    assert "starting Ray" not in again.stdout


def test_what_is_wrong_with_a_method_is_said_before_anything_starts(folder: Path) -> None:
    completed = run_command([*WORDS, "compare.methods.prompt.method={kind: lora, rnk: 2}"], folder)
    assert completed.returncode == 2
    assert "compare.methods.prompt.method.rnk" in completed.stderr
