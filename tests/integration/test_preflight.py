"""What can be known to go wrong is said before anything trains: all of it at once, each with its remedy."""

from pathlib import Path

import pytest

from tests.integration.command import run_command
from tests.shared_data import SHARED, needs

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_all_findings_come_at_once_and_nothing_is_started(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n', encoding="utf-8")
    (tmp_path / "questions.json").write_text('[{"instruction": "no answer"}]', encoding="utf-8")
    asked = ["text=text.jsonl", "instructions=questions.json", "tracking.mode=online", "stage=all", "run_root=runs"]
    completed = run_command(asked, tmp_path)
    assert completed.returncode == 2
    assert "text.jsonl:2" in completed.stderr
    assert "questions.json" in completed.stderr
    assert "tracking.mode: online, but nobody is logged in to wandb here; run `wandb login`" in completed.stdout
    assert "starting Ray" not in completed.stdout
    assert not list((tmp_path / "runs").glob("*-????????????"))


@needs("stories260k")
def test_preflight_alone_takes_a_dry_step_and_leaves_nothing(tmp_path: Path) -> None:
    asked = [
        f"base_model={SHARED}/stories260k",
        "stages.vocabulary.merge=none",
        "stage=2",
        "preflight=only",
        "workers=2",
        # The vocabulary stage makes the base; what has one already is rehearsed.
    ]
    completed = run_command(asked, tmp_path)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    for said in (
        "5 stages fit the base",
        "run root",
        "data",
        "disk",
        "wandb",
        "node",
        "memory of embeddings",
        "memory of attention",
    ):
        assert said in completed.stdout
    assert "none yet: vocabulary has to make its base first" in completed.stdout
    assert "nothing stands in the way" in completed.stdout
    assert list((tmp_path / "runs").iterdir()) == []
    made = run_command([*asked[:2], "stage=0", "tracking=none"], tmp_path)
    assert made.returncode == 0, made.stdout + made.stderr
    before = sorted((tmp_path / "runs").iterdir())
    completed = run_command(asked, tmp_path)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    for stage in ("embeddings", "attention"):
        (line,) = (line for line in completed.stdout.splitlines() if f"dry step of {stage}" in line)
        assert "for a full batch" in line
        assert "MB at most in a worker" in line
    assert sorted((tmp_path / "runs").iterdir()) == before


def test_out_of_memory_is_found_by_the_dry_step(tmp_path: Path) -> None:
    base = ["base_model.hidden_size=8192", "base_model.intermediate_size=64", "base_model.num_layers=1"]
    made = run_command([*base, "stages.vocabulary.merge=none", "stage=0", "tracking=none"], tmp_path)
    assert made.returncode == 0, made.stdout + made.stderr
    # The first hidden states alone are 275 GB, which no system promises.
    large = "{block_length: 512, global_batch_size: 32768, resources: {micro_batch_size: 32768}}"
    asked = [*base, "stages.vocabulary.merge=none", "stage=1", "workers=1", f"stages.embeddings={large}", "preflight=only"]
    completed = run_command(asked, tmp_path)
    assert completed.returncode == 2
    assert "stages.embeddings: its largest step failed: rank 0" in completed.stderr
    assert "lower resources.micro_batch_size" in completed.stderr
    assert "stages.embeddings: a worker will hold about" in completed.stdout
    assert not list((tmp_path / "runs").glob("embeddings-*"))


def test_a_disk_that_is_too_small_is_seen_before_it_is_full(tmp_path: Path) -> None:
    asked = ["stage=2", "checkpoint.keep=1000000000", "preflight=only"]
    completed = run_command(asked, tmp_path)
    assert completed.returncode == 2
    assert "run_root: " in completed.stderr
    assert "of checkpoints while they train; make room" in completed.stderr
