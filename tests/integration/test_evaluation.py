"""What a stage measures while it trains, which state it keeps, and an evaluation of all models side by side."""

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.store import sha256_file
from orchestrator.tracking.evaluations import read_evaluations
from tests.faults.running import running
from tests.integration.command import run_command
from tests.shared_data import ROOT, SHARED, needs
from tests.wandb_reader import read_offline_runs

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    needs("stories260k", "text/luxun_train.jsonl", "text/luxun_validation.jsonl", "instructions/alpaca_zh_demo.json"),
]

PROMPTS = ("从前有一个", "Once upon a time")
QUESTIONS = [("A cat is an", ["animal", "number"]), ("One and one is", ["two", "blue"])]
TASK = {
    "task": "two_questions",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "QUESTIONS"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}
"""As the harness describes a task."""


def task_folder(folder: Path) -> Path:
    """A task of our own with its questions, which needs no download."""
    tasks = folder / "tasks"
    tasks.mkdir()
    rows = [{"question": question, "choices": choices, "answer": 0} for question, choices in QUESTIONS]
    (tasks / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    described = TASK | {"dataset_kwargs": {"data_files": {"test": str(tasks / "questions.jsonl")}}}
    (tasks / "two_questions.yaml").write_text(yaml.safe_dump(described), encoding="utf-8")
    return tasks


def words(folder: Path) -> list[str]:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    shutil.copyfile(SHARED / "text/luxun_validation.jsonl", folder / "held_out.jsonl")
    return [
        f"base_model={SHARED}/stories260k",
        f"text={SHARED}/text/luxun_train.jsonl",
        f"instructions={SHARED}/instructions/alpaca_zh_demo.json",
        "validation=held_out.jsonl",
        "workers=2",
        "evaluation.every_steps=6",
        'evaluation.prompts=["从前有一个","Once upon a time"]',
        "evaluation.sample_tokens=8",
        # So fast that what was known is forgotten from the first steps on.
        "stages.embeddings={steps: 24, learning_rate: 0.1, schedule: constant}",
        "stages.embeddings.keep_best={of: retention, every_steps: 4, patience: 2}",
        "stages.attention.steps=6",
        "stages.instruct.steps=6",
        "license=apache-2.0",
    ]


@dataclass(frozen=True)
class Finished:
    """A run of the whole pipeline with an evaluation at its end."""

    folder: Path
    output: str

    def stage(self, name: str) -> Path:
        (found,) = (self.folder / "runs").glob(f"{name}-????????????")
        return found

    def results(self, name: str) -> dict[str, Any]:
        return json.loads((self.stage(name) / "record.json").read_text(encoding="utf-8"))["results"]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the extra `evaluation` adds, in a folder of its own: transformers imports some of it wherever it is installed."""
    site = tmp_path_factory.mktemp("harness")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    asked = subprocess.run([*pip, "--dry-run", "--report", "-", "lm-eval"], capture_output=True, text=True, check=False)
    if asked.returncode:
        pytest.skip(f"lm-eval cannot be installed here: {asked.stderr.strip().splitlines()[-1]}")
    wanted = [each["metadata"] for each in json.loads(asked.stdout)["install"]]
    packages = [f"{each['name']}=={each['version']}" for each in wanted] or ["lm-eval"]
    subprocess.run([*pip, "--no-deps", "--target", str(site), *packages], capture_output=True, timeout=240, check=True)
    return site


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, harness: Path) -> Finished:
    folder = tmp_path_factory.mktemp("evaluation")
    tasks = task_folder(folder)
    stage = f"{{kind: evaluate, prompts: prompts.txt, sample_tokens: 8, tasks: [two_questions], task_folder: {tasks}}}"
    asked = [*words(folder), f"stages.evaluate={stage}", "stage=all"]
    completed = run_command(asked, folder, seconds=800, more={"PYTHONPATH": str(harness)})
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return Finished(folder, completed.stdout)


def test_held_out_sets_and_samples_are_measured_every_so_many_steps(finished: Finished) -> None:
    rows = finished.results("attention")["evaluations"]
    assert [row["step"] for row in rows] == [6]
    rows = finished.results("embeddings")["evaluations"]
    steps = [row["step"] for row in rows]
    assert steps == [4, 6, 8, 12]
    assert rows == read_evaluations(finished.stage("embeddings") / "evaluations.jsonl")
    for row in rows:
        assert row["held_out"].keys() == {"validation", "retention"}
        for numbers in row["held_out"].values():
            assert numbers["perplexity"] == pytest.approx(math.exp(numbers["loss"]))
            # Three bytes to a Chinese character, one to an English one.
            assert 0.9 < numbers["bits_per_character"] / numbers["bits_per_byte"] < 3.1
        assert [sample["prompt"] for sample in row["samples"]] == list(PROMPTS)
    assert "Once upon a time" in finished.output


def test_the_kept_state_is_the_one_with_the_least_held_out_loss(finished: Finished) -> None:
    results = finished.results("embeddings")
    judged = {row["step"]: row["held_out"]["retention"]["loss"] for row in results["evaluations"] if row["step"] % 4 == 0}
    best = min(judged, key=judged.__getitem__)
    # It waited twice, and no longer.
    assert (best, results["steps"]) == (4, 12)
    assert results["kept_step"] == best
    assert results["held_out"]["retention"]["after"]["loss"] == judged[best]
    manifest = json.loads((finished.stage("embeddings") / "adapter" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["origin"]["step"] == best
    # The next stage starts from there.
    assert finished.results("attention")["held_out"]["retention"]["before"]["loss"] == pytest.approx(judged[best], rel=1e-3)
    assert "kept the state of step 4, the best of 12 steps" in finished.output


def test_wandb_has_the_held_out_numbers_by_step(finished: Finished) -> None:
    (run,) = read_offline_runs(finished.stage("embeddings"))
    logged = {row["step"]: row["validation/bits_per_byte"] for row in run.history if "validation/bits_per_byte" in row}
    rows = finished.results("embeddings")["evaluations"]
    assert logged == {row["step"]: row["held_out"]["validation"]["bits_per_byte"] for row in rows}


def test_an_evaluation_measures_base_stages_and_merged_model_side_by_side(finished: Finished) -> None:
    models = {model["name"]: model for model in finished.results("evaluate")["models"]}
    assert list(models) == ["base", "vocabulary", "embeddings", "attention", "instruct", "export"]
    for name, model in models.items():
        assert model["held_out"].keys() == {"validation", "retention"}
        assert [sample["prompt"] for sample in model["samples"]] == list(PROMPTS), name
        assert 0 <= model["tasks"]["two_questions"]["acc"] <= 1
    # With stock tools they are what the stages measured themselves.
    for name in ("embeddings", "attention", "instruct"):
        own = finished.results(name)["held_out"]["validation"]["after"]["bits_per_byte"]
        assert models[name]["held_out"]["validation"]["bits_per_byte"] == pytest.approx(own, rel=5e-3)
    merged, adapter = (models[name]["held_out"]["validation"]["bits_per_byte"] for name in ("export", "instruct"))
    assert merged == pytest.approx(adapter, rel=1e-2)
    table = (finished.stage("evaluate") / "table.md").read_text(encoding="utf-8")
    assert table.rstrip() in finished.output
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:8]] == list(models)


def test_its_numbers_are_those_of_the_harness_and_of_plain_torch(finished: Finished) -> None:
    merged = finished.stage("export") / "merged"
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(merged)
    right = 0
    for question, choices in QUESTIONS:
        scores = [_log_likelihood(model, tokenizer, question, choice) for choice in choices]
        right += scores[0] == max(scores)
    models = {each["name"]: each for each in finished.results("evaluate")["models"]}
    assert models["export"]["tasks"]["two_questions"]["acc"] == right / len(QUESTIONS)


def _log_likelihood(model: Any, tokenizer: Any, question: str, choice: str) -> float:
    """As the harness asks it: the choice behind a space."""
    given, whole = (tokenizer(text)["input_ids"] for text in (question, f"{question} {choice}"))
    with torch.no_grad():
        chances = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    return sum(chances[at - 1, whole[at]].item() for at in range(len(given), len(whole)))


def test_exported_adapter_and_model_have_a_card(finished: Finished) -> None:
    for kind, library in (("adapter", "peft"), ("merged", "transformers")):
        card = (finished.stage("export") / kind / "README.md").read_text(encoding="utf-8")
        _, metadata, text = card.split("---\n", 2)
        found = yaml.safe_load(metadata)
        assert (found["license"], found["library_name"], found["base_model"]) == ("apache-2.0", library, "stories260k")
        assert "luxun_train.jsonl" in text
        assert "python launch/run.py" in text
        after = finished.results("instruct")["held_out"]["validation"]["after"]["bits_per_byte"]
        assert f"{after:.3f}" in text
    # It is listed like every other file, and the adapter still loads and verifies.
    record = json.loads((finished.stage("export") / "record.json").read_text(encoding="utf-8"))
    assert record["files"]["adapter/README.md"] == sha256_file(finished.stage("export") / "adapter" / "README.md")
    base = AutoModelForCausalLM.from_pretrained(finished.stage("vocabulary") / "base")
    assert PeftModel.from_pretrained(base, str(finished.stage("export") / "adapter"))


def test_the_plan_of_what_is_done_knows_its_data(finished: Finished) -> None:
    command = [sys.executable, str(ROOT / "launch" / "plan.py"), *words(finished.folder), "--json"]
    told = subprocess.run(command, cwd=finished.folder, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0, told.stderr
    stages = {stage["name"]: stage for stage in json.loads(told.stdout)["stages"]}
    assert {stage["state"] for stage in stages.values()} == {"DONE"}
    assert stages["embeddings"]["data"]["documents"] == 626
    assert stages["embeddings"]["data"]["tokens"] > 1_000_000
    assert stages["instruct"]["data"]["documents"] == 1000


def report(finished: Finished, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "report.py"), *arguments]
    return subprocess.run(command, cwd=finished.folder, capture_output=True, text=True, timeout=60, check=False)


def test_a_report_sums_up_the_run_on_one_page(finished: Finished) -> None:
    told = report(finished, "runs")
    assert told.returncode == 0, told.stderr
    page = (finished.folder / "report.html").read_text(encoding="utf-8")
    names = ("vocabulary", "embeddings", "attention", "instruct", "export", "evaluate")
    for name in names:
        folder = finished.stage(name).name
        assert f'id="{folder}"' in page
        assert folder in told.stdout
    for text in (*PROMPTS, "two_questions: acc", "tokens per character before", "the state of step 4 was kept", "stage=all"):
        assert text in page, text
    after = finished.results("instruct")["held_out"]["validation"]["after"]["bits_per_byte"]
    assert f"{after:.3f}" in page
    assert f"{after:.3f}" in told.stdout
    assert "6 of 6 stages done" in told.stdout
    assert page.count("<polyline") >= 3 * 5


def test_two_stages_named_together_are_compared(finished: Finished) -> None:
    one, other = (f"runs/{finished.stage(name).name}" for name in ("embeddings", "instruct"))
    told = report(finished, one, other, "--out", "both.html")
    assert told.returncode == 0, told.stderr
    page = (finished.folder / "both.html").read_text(encoding="utf-8")
    assert "What differs" in page
    assert "The same stage: " in page
    assert "only in one of them" in told.stdout
    # A page may be written again, and nothing else is written over.
    assert report(finished, one, other, "--out", "both.html").returncode == 0
    refused = report(finished, "runs", "--out", "prompts.txt")
    assert refused.returncode == 2
    assert "prompts.txt: is there already, and is no report" in refused.stderr
    assert (finished.folder / "prompts.txt").read_text(encoding="utf-8") == "\n".join(PROMPTS)
    missing = report(finished, "nowhere")
    assert missing.returncode == 2
    assert "nowhere" in missing.stderr


def test_a_run_that_was_killed_keeps_the_same_state_and_measures_the_same(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(
        finished.folder / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("embeddings-*", "a*", "i*", "e*")
    )
    asked = [*words(tmp_path), "stage=1", "tracking=none", "checkpoint.every_steps=5"]
    with running(asked, tmp_path) as command:
        command.wait_for_checkpoint(8)
        command.process.send_signal(signal.SIGKILL)
        command.wait()
    with running(asked, tmp_path) as command:
        assert command.wait() == 0, command.output
        assert command.events("resumed")
        stage = command.stage
    record = json.loads((stage / "record.json").read_text(encoding="utf-8"))["results"]
    straight = finished.results("embeddings")
    assert record["kept_step"] == straight["kept_step"]
    assert [row["held_out"] for row in record["evaluations"]] == [row["held_out"] for row in straight["evaluations"]]
    assert [row["samples"] for row in record["evaluations"]] == [row["samples"] for row in straight["evaluations"]]
    weights = "adapter/adapter_model.safetensors"
    assert sha256_file(stage / weights) == sha256_file(finished.stage("embeddings") / weights)


def test_what_is_not_held_out_cannot_judge(tmp_path: Path) -> None:
    completed = run_command(["stage=1", "validation=null", "stages.embeddings.keep_best={every_steps: 5}"], tmp_path)
    assert completed.returncode == 2
    assert "stages.embeddings.keep_best.of: nothing is held out as validation; give validation" in completed.stderr
    assert not (tmp_path / "runs").exists()
