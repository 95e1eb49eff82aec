"""All five stages on real text: the command of the README, on two Ray workers with ZeRO-2."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.plan.record import WORK_NAMES
from orchestrator.tracking import read_metrics
from tests.integration.command import run_command
from tests.shared_data import SHARED, needs
from tests.wandb_reader import read_offline_runs

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    # The first test waits for all five stages, and on a fresh machine for DeepSpeed's op to be built.
    pytest.mark.timeout(1200),
    needs("stories260k", "text/luxun_train.jsonl", "text/luxun_validation.jsonl", "instructions/alpaca_zh_demo.json"),
]

TRAINED = ("embeddings", "attention", "instruct")


@dataclass(frozen=True)
class Finished:
    """A run of the whole pipeline, and what it printed."""

    folder: Path
    words: list[str]
    output: str

    def stage(self, name: str) -> Path:
        (found,) = (self.folder / "runs").glob(f"{name}-????????????")
        return found

    def record(self, name: str) -> dict[str, Any]:
        return json.loads((self.stage(name) / "record.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("pipeline")
    words = [
        "recipe=chinese_llama",
        f"base_model={SHARED}/stories260k",
        f"text={SHARED}/text/luxun_train.jsonl",
        f"instructions={SHARED}/instructions/alpaca_zh_demo.json",
        f"validation={SHARED}/text/luxun_validation.jsonl",
        "workers=2",
        "zero=2",
        "run_root=runs",
        "seed=1",
    ]
    completed = run_command([*words, "stage=all"], folder, seconds=1000)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return Finished(folder, words, completed.stdout)


def bits_per_character(finished: Finished, stage: str, text: str, when: str) -> float:
    return finished.record(stage)["results"]["held_out"][text][when]["bits_per_character"]


def test_held_out_chinese_gets_cheaper_with_every_stage_that_learns_chinese_text(finished: Finished) -> None:
    for stage in ("embeddings", "attention"):
        before, after = (bits_per_character(finished, stage, "validation", when) for when in ("before", "after"))
        assert after < 0.95 * before
    assert bits_per_character(finished, "attention", "validation", "before") == pytest.approx(
        bits_per_character(finished, "embeddings", "validation", "after"), rel=1e-3
    )


def test_simple_english_is_kept_within_what_the_recipe_allows(finished: Finished) -> None:
    for stage in TRAINED:
        record = finished.record(stage)
        rise = (
            bits_per_character(finished, stage, "retention", "after")
            - (record["results"]["reference"]["retention"]["bits_per_character"])
        )
        assert rise < record["recipe"]["retention"]["max_rise"]
    assert "retention.max_rise" not in finished.output


def test_each_stage_leaves_what_the_layout_promises(finished: Finished) -> None:
    assert (finished.stage("vocabulary") / "tokenizer" / "tokenizer.model").is_file()
    for stage in TRAINED:
        names = {path.name for path in (finished.stage(stage) / "adapter").iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "manifest.json", "tokenizer.json"} <= names
    assert (finished.stage("export") / "adapter" / "adapter_config.json").is_file()
    assert (finished.stage("export") / "merged" / "config.json").is_file()
    for stage in (*TRAINED, "vocabulary", "export"):
        listed = set(finished.record(stage)["files"])
        found = {path.relative_to(finished.stage(stage)).as_posix() for path in finished.stage(stage).glob("*/*")}
        assert listed == {path for path in found if not path.startswith(tuple(f"{name}/" for name in WORK_NAMES))}


def test_metrics_count_every_step_and_the_loss_falls(finished: Finished) -> None:
    for stage in TRAINED:
        rows = read_metrics(finished.stage(stage) / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, finished.record(stage)["results"]["steps"] + 1))
        named = {"loss", "tokens", "tokens_per_second", "seconds", "learning_rate", "gradient_norm", "memory_bytes"}
        assert named <= set(rows[0])
        assert all(math.isfinite(row["loss"]) for row in rows)
        assert sum(row["loss"] for row in rows[-5:]) < sum(row["loss"] for row in rows[:5])


def test_metrics_say_where_the_time_of_a_step_goes(finished: Finished) -> None:
    parts = [f"{part}_seconds" for part in ("reading", "forward", "backward", "communication", "optimizer", "other")]
    for stage in TRAINED:
        rows = read_metrics(finished.stage(stage) / "metrics.jsonl")
        for row in rows:
            assert row.keys() >= set(parts)
            spent = sum(value for name, value in row.items() if name.endswith("_seconds"))
            assert spent == pytest.approx(row["seconds"], rel=0.01)
            assert 0 < row["flops_utilisation"] < 1
        # What looks at the first steps is over then, and hardly anything but computing is left.
        computing = sum(row["forward_seconds"] + row["backward_seconds"] + row["optimizer_seconds"] for row in rows[5:])
        assert computing > 0.5 * sum(row["seconds"] for row in rows[5:])
        # A checkpoint shows in the step after it.
        assert finished.record(stage)["results"]["step"]["checkpoint_seconds"] >= 0
    assert any("checkpoint_seconds" in row for row in read_metrics(finished.stage("attention") / "metrics.jsonl"))
    assert finished.output.count("of the devices' peak") == len(TRAINED)


def test_wandb_holds_the_same_numbers_one_run_for_each_stage_of_one_group(finished: Finished) -> None:
    runs = {stage: read_offline_runs(finished.stage(stage)) for stage in TRAINED}
    assert [len(attempts) for attempts in runs.values()] == [1, 1, 1]
    assert len({attempts[0].group for attempts in runs.values()}) == 1
    for stage, (run,) in runs.items():
        rows = read_metrics(finished.stage(stage) / "metrics.jsonl")
        assert run.id == finished.stage(stage).name
        assert run.job_type == stage
        assert (
            run.config["recipe"]["stages"][stage]["learning_rate"]
            == (finished.record(stage)["recipe"]["stages"][stage]["learning_rate"])
        )
        assert run.config["fingerprint"] == finished.record(stage)["fingerprint"]
        assert [(row["step"], row["loss"]) for row in run.history] == [(row["step"], row["loss"]) for row in rows]


def test_the_merged_model_answers_through_stock_tools(finished: Finished) -> None:
    merged = finished.stage("export") / "merged"
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer is not None
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.config.vocab_size >= len(tokenizer)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert written.shape[1] > ids.shape[1]
    assert finished.record("export")["results"]["merged_logit_difference"] < 0.05


def test_the_same_command_again_does_nothing_and_says_so_at_once(finished: Finished) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished.folder / "runs").rglob("*")}
    started = time.monotonic()
    completed = run_command([*finished.words, "stage=all"], finished.folder)
    seconds = time.monotonic() - started
    assert completed.returncode == 0, completed.stderr
    assert "nothing to run" in completed.stdout
    assert {path: path.stat().st_mtime_ns for path in (finished.folder / "runs").rglob("*")} == before
    assert seconds < 3


def test_a_changed_learning_rate_reruns_its_stage_in_a_new_folder_and_reuses_what_came_before(finished: Finished) -> None:
    changed = [*finished.words, "stage=2", "stages.attention.learning_rate=7e-4", "stages.attention.steps=3"]
    completed = run_command(changed, finished.folder)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert "learning_rate 0.001 → 0.0007" in completed.stdout
    lines = [line.split() for line in completed.stdout.splitlines()]
    states = {line[1]: word for line in lines if len(line) > 2 for word in line if word in ("DONE", "RUN", "SKIP")}
    assert states == {"vocabulary": "DONE", "embeddings": "DONE", "attention": "RUN", "instruct": "SKIP", "export": "SKIP"}
    assert len(list((finished.folder / "runs").glob("attention-????????????"))) == 2
    assert len(list((finished.folder / "runs").glob("embeddings-????????????"))) == 1
