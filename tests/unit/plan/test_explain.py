"""Why a stage runs: which field changed, and against which finished stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.plan.explain import why_new
from orchestrator.plan.record import Record, commit
from orchestrator.store import read_json, write_json

IDENTITY: dict[str, Any] = {
    "format": 1,
    "stage": {"kind": "train", "learning_rate": 1e-4, "method": {"rank": 8, "targets": ["q_proj"]}, "steps": 10},
    "seed": 1,
    "precision": "bf16",
    "data": "d" * 64,
    "parents": {"vocabulary": "a" * 64, "embeddings": "b" * 64},
}
OLD, NEW = "attention-000000000000", "attention-111111111111"


@pytest.fixture
def finished(tmp_path: Path) -> Callable[..., Path]:
    """Makes a finished stage's folder."""

    def make(name: str, identity: dict[str, Any]) -> Path:
        (tmp_path / name).mkdir()
        record = Record(
            stage=name.rpartition("-")[0],
            kind="train",
            fingerprint="f" * 64,
            identity=identity,
            parents={},
            recipe={},
            results={},
            environment={},
        )
        commit(tmp_path / name, record)
        return tmp_path / name

    return make


def with_stage(**changes: Any) -> dict[str, Any]:
    return IDENTITY | {"stage": IDENTITY["stage"] | changes}


@pytest.mark.parametrize(
    ("identity", "explanation"),
    [
        (with_stage(learning_rate=2e-4), "learning_rate 0.0001 → 0.0002"),
        (with_stage(method={"rank": 16, "targets": ["q_proj"]}), "method.rank 8 → 16"),
        (with_stage(method={"rank": 8, "targets": ["k_proj"]}), "method.targets ['q_proj'] → ['k_proj']"),
        (with_stage(template="chat"), "template None → chat"),
        (IDENTITY | {"seed": 2}, "seed 1 → 2"),
        (IDENTITY | {"data": "e" * 64}, "data has other content"),
        (IDENTITY | {"parents": {"vocabulary": "a" * 64, "embeddings": "c" * 64}}, "follows a changed embeddings"),
        (
            IDENTITY | {"parents": {"vocabulary": "c" * 64, "embeddings": "c" * 64}},
            "follows a changed vocabulary and embeddings",
        ),
        (IDENTITY | {"parents": {"vocabulary": "a" * 64}}, "other parents"),
        (with_stage(steps=20) | {"seed": 2, "precision": "fp32"}, "precision bf16 → fp32, seed 1 → 2, steps 10 → 20"),
        (
            with_stage(steps=20, learning_rate=1e-3) | {"seed": 2, "precision": "fp32"},
            "precision bf16 → fp32, seed 1 → 2, learning_rate 0.0001 → 0.001, …",
        ),
    ],
)
def test_what_changed_is_named_with_the_record_it_is_held_against(
    finished, tmp_path: Path, identity: dict[str, Any], explanation: str
) -> None:
    finished(OLD, IDENTITY)
    assert why_new("attention", identity, tmp_path / NEW) == f"{explanation} (against {OLD})"


def test_the_newest_finished_stage_is_compared(finished, tmp_path: Path) -> None:
    for digit, seed, age in (("2", 7, 3), ("3", 8, 1), ("4", 9, 2)):
        folder = finished(f"attention-{digit * 12}", IDENTITY | {"seed": seed})
        age_record(folder, age)
    assert why_new("attention", IDENTITY, tmp_path / NEW) == "seed 8 → 1 (against attention-333333333333)"


def test_other_stages_and_unfinished_folders_are_not_compared(finished, tmp_path: Path) -> None:
    finished("instruct-000000000000", IDENTITY | {"seed": 2})
    finished("more-attention-000000000000", IDENTITY | {"seed": 3})
    finished("attention-copy", IDENTITY | {"seed": 4})
    (tmp_path / OLD).mkdir()
    assert why_new("attention", IDENTITY, tmp_path / NEW) == "new"


def test_a_folder_without_a_record_is_not_finished_yet(tmp_path: Path) -> None:
    (tmp_path / NEW).mkdir()
    assert why_new("attention", IDENTITY, tmp_path / NEW) == "not finished yet"


def age_record(folder: Path, hours: float) -> None:
    """As if the stage had finished so long before."""
    record = read_json(folder / "record.json")
    write_json(folder / "record.json", record | {"finished": record["finished"] - 3600 * hours})
