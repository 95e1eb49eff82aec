"""One command runs a pipeline for each combination of words, and what several share runs once."""

import json
from pathlib import Path

import pytest

from tests.integration.command import run_command

pytestmark = [pytest.mark.ray, pytest.mark.slow]

WORDS = ["-m", "stage=2", "tracking=none", "workers=2", "stages.embeddings.steps=2", "stages.attention.steps=2"]


def test_a_sweep_shares_what_is_the_same_and_compares_the_rest(tmp_path: Path) -> None:
    asked = [*WORDS, "stages.attention.learning_rate=1e-3,2e-3", "seed=1"]
    completed = run_command(asked, tmp_path, seconds=400)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    folders = [
        path.name.rpartition("-")[0]
        for path in (tmp_path / "runs").glob("*-????????????")
        if (path / "record.json").is_file()
    ]
    assert sorted(folders) == ["attention", "attention", "embeddings", "vocabulary"]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "runs").glob("attention-*/record.json")]
    table = completed.stdout.rpartition("combination")[2]
    for record in records:
        rate = record["identity"]["stage"]["learning_rate"]
        after = record["results"]["held_out"]["validation"]["after"]["bits_per_character"]
        (line,) = (line for line in table.splitlines() if line.startswith(f"stages.attention.learning_rate={rate:g} "))
        assert f"{after:.3f}" in line
    again = run_command(asked, tmp_path)
    assert again.returncode == 0
    assert "nothing to run" in again.stdout


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("zero=1,2", "zero: one command has one; a sweep varies what is learned"),
        ("stages.attention.log_every_steps=1,2", "learn the same; a sweep varies what is learned"),
        ("stages.attention.learning_rate=1e-3,fast", "stages.attention.learning_rate"),
        ("stage=1,2", "stages of one pipeline are a list, stage=[1,2], without --multirun"),
        ("seed=1", "no word has several values"),
    ],
)
def test_what_cannot_be_swept_is_refused(tmp_path: Path, word: str, said: str) -> None:
    completed = run_command([*WORDS, word], tmp_path)
    assert completed.returncode == 2
    assert said in completed.stderr
    assert not (tmp_path / "runs").exists()
