"""Done means one thing: the completion record, written last and whole."""

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import OrchestratorError
from orchestrator.plan.record import WORK_NAMES, Record, commit, read_record

RECORD = Record(
    stage="attention",
    kind="train",
    fingerprint="f" * 64,
    identity={"stage": {"lora": {"rank": 8, "targets": ["q_proj"]}}, "seed": 1},
    parents={"embeddings": "e" * 64},
    recipe={"name": "laptop"},
    results={"文字": 1.5},
    environment={"python": "3.11"},
)
ARTIFACT = ("adapter/adapter_model.safetensors", "adapter/nested/config.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stage's folder as training leaves it: an artifact of two files, and work beside it."""
    folder = tmp_path / "attention-ffffffffffff"
    for name in (*ARTIFACT, "checkpoints/step-00000005/state.json", "logs/rank0.log", "wandb/run", "work/rows"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    for name in ("evaluations.jsonl", "ledger.jsonl", "lease.json", "metrics.jsonl"):
        (folder / name).write_text("{}")
    return folder


def test_a_record_is_read_back_as_it_was_committed(folder: Path) -> None:
    before = time.time()
    record = commit(folder, RECORD)
    assert read_record(folder) == record
    assert record == replace(RECORD, files=record.files, finished=record.finished)
    assert before <= record.finished <= time.time()


def test_it_lists_every_file_of_the_artifact_with_its_sha256(folder: Path) -> None:
    files = commit(folder, RECORD).files
    assert files == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ARTIFACT}


def test_work_beside_the_artifact_is_not_listed(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"adapter", *WORK_NAMES}
    assert {name.partition("/")[0] for name in commit(folder, RECORD).files} == {"adapter"}


def test_without_a_record_a_stage_is_not_done(folder: Path, tmp_path: Path) -> None:
    assert read_record(folder) is None
    assert read_record(tmp_path / "never-run") is None


def test_a_commit_that_fails_leaves_no_record_and_no_temporary_file(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match="JSON"):
        commit(folder, replace(RECORD, results={"loss": float("nan")}))
    assert read_record(folder) is None
    assert sorted(folder.rglob("*")) == before


def test_a_record_of_another_format_is_refused(folder: Path) -> None:
    commit(folder, RECORD)
    path = folder / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(OrchestratorError) as caught:
        read_record(folder)
    assert str(caught.value) == f"{path}: format 2 was written by another version; this one reads 1"


def test_an_artifact_can_be_read_by_everyone(folder: Path) -> None:
    weights = folder / "adapter" / "adapter_model.safetensors"
    weights.chmod(0o600)
    commit(folder, RECORD)
    assert [path.stat().st_mode & 0o044 for path in (weights, folder / "record.json")] == [0o044, 0o044]
