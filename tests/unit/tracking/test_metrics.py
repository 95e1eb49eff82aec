"""The metrics file: what was written is read back, whatever killed the writer."""

import json
import math
from pathlib import Path

import pytest

from orchestrator.errors import DataError
from orchestrator.tracking import MetricsFile, read_metrics
from orchestrator.tracking.metrics import METRICS_NAME, GrowingMetrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "stage" / "metrics.jsonl"


def write_steps(path: Path, *steps: int, loss: float = 1.0, keep_through_step: int | None = None) -> None:
    with MetricsFile(path, keep_through_step) as metrics:
        for step in steps:
            metrics.write({"step": step, "loss": loss})


def test_rows_are_read_back_in_order(path: Path) -> None:
    rows: list[dict[str, float | int | None]] = [
        {"step": 1, "loss": 0.1 + 0.2, "num_tokens": 2**40, "validation_loss": None},
        {"step": 2, "loss": 1e-300, "num_tokens": 2**41, "validation_loss": 3.5},
    ]
    with MetricsFile(path) as metrics:
        for row in rows:
            metrics.write(row)
    assert read_metrics(path) == rows


def test_a_row_can_be_read_while_the_file_is_open(path: Path) -> None:
    metrics = MetricsFile(path)
    metrics.write({"step": 1, "loss": 2.0})
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    metrics.close()


def test_numbers_that_json_cannot_hold_survive_in_valid_json(path: Path) -> None:
    with MetricsFile(path) as metrics:
        metrics.write({"step": 1, "loss": math.nan, "high": math.inf, "low": -math.inf})

    def refuse(token: str) -> float:
        raise AssertionError(f"{token} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "step": 1,
        "loss": "NaN",
        "high": "Infinity",
        "low": "-Infinity",
    }
    (row,) = read_metrics(path)
    assert math.isnan(row["loss"])
    assert (row["high"], row["low"]) == (math.inf, -math.inf)


def test_a_missing_file_has_no_rows(path: Path) -> None:
    assert read_metrics(path) == []


def test_opening_again_appends(path: Path) -> None:
    write_steps(path, 1, 2)
    write_steps(path, 3)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_a_resumed_run_has_one_row_for_a_step(path: Path) -> None:
    write_steps(path, 1, 2, 3, 4, loss=1.0)
    write_steps(path, 3, 4, loss=2.0, keep_through_step=2)
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


@pytest.mark.parametrize("keep_through_step", [0, -1])
def test_keeping_no_step_starts_anew(path: Path, keep_through_step: int) -> None:
    write_steps(path, 0, 1)
    write_steps(path, 0, keep_through_step=keep_through_step)
    assert [row["step"] for row in read_metrics(path)] == [0]


def test_dropping_rows_replaces_the_file_at_once(path: Path) -> None:
    write_steps(path, 1, 2, 3)
    with path.open("rb") as reader:
        before = path.read_bytes()
        MetricsFile(path, keep_through_step=1).close()
        assert reader.read() == before, "the file that was open is written in place"
    assert [row["step"] for row in read_metrics(path)] == [1]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_line_cut_short_by_a_kill_is_no_row_and_harms_no_later_one(path: Path, cut: int) -> None:
    write_steps(path, 1, 2)
    path.write_bytes(path.read_bytes()[:-cut])
    assert [row["step"] for row in read_metrics(path)] == [1]
    write_steps(path, 2, 3)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["{", "", "[1]", '{"loss": 1.0}', '{"step": "2"}', "\x00\x00"])
def test_a_bad_line_elsewhere_is_named(path: Path, line: str) -> None:
    write_steps(path, 1)
    path.write_text(path.read_text() + line + "\n" + '{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not "):
        read_metrics(path)
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not "):
        MetricsFile(path, keep_through_step=3)


def test_a_row_without_a_step_is_refused(path: Path) -> None:
    with MetricsFile(path) as metrics, pytest.raises(AssertionError, match="step"):
        metrics.write({"loss": 1.0})


def test_rows_of_a_file_that_grows_are_those_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / METRICS_NAME
    growing = GrowingMetrics(path)
    assert growing.rows() == []
    with MetricsFile(path) as file:
        for step in (1, 2, 3):
            file.write({"step": step, "loss": math.nan if step == 2 else float(step)})
            assert repr(growing.rows()) == repr(read_metrics(path))
    # A line counts once it is whole.
    with path.open("ab") as torn:
        torn.write(b'{"step": 4,')
    assert [row["step"] for row in growing.rows()] == [1, 2, 3]
    with path.open("ab") as whole:
        whole.write(b' "loss": 4.0}\n')
    assert [row["step"] for row in growing.rows()] == [1, 2, 3, 4]


def test_a_resumed_run_takes_rows_back(tmp_path: Path) -> None:
    path = tmp_path / METRICS_NAME
    growing = GrowingMetrics(path)
    with MetricsFile(path) as file:
        for step in (1, 2, 3, 4):
            file.write({"step": step, "loss": 1.0})
    assert len(growing.rows()) == 4
    with MetricsFile(path, keep_through_step=2) as file:
        assert [row["step"] for row in growing.rows()] == [1, 2]
        file.write({"step": 3, "loss": 2.0})
        assert [row["loss"] for row in growing.rows()] == [1.0, 1.0, 2.0]


def test_what_is_handed_out_is_not_what_is_kept(tmp_path: Path) -> None:
    path = tmp_path / METRICS_NAME
    growing = GrowingMetrics(path)
    with MetricsFile(path) as file:
        file.write({"step": 1, "loss": 1.0})
        growing.rows().clear()
        assert len(growing.rows()) == 1
