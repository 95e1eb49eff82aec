"""The truth about a run's numbers: an append-only file, one JSON object per line, each with the step it belongs to.

A number that JSON cannot hold is written as "NaN", "Infinity" or "-Infinity" and read back as a float.
A line counts once its newline is on disk: what a killed process wrote of its last line is no row.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

from orchestrator.errors import DataError
from orchestrator.store import write_bytes

METRICS_NAME = "metrics.jsonl"
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsFile:
    """Appends rows; each can be read by others as soon as `write` returns."""

    def __init__(self, path: Path, keep_through_step: int | None = None) -> None:
        """Drops the rows after `keep_through_step`, which a resumed run writes again; 0 or less starts anew, None keeps all.

        Raises DataError where a row to be kept is malformed.
        """
        _trim(path, keep_through_step)
        self._file = path.open("ab")

    def write(self, row: Mapping[str, float | int | None]) -> None:
        """`row` holds `step`, the number of optimizer updates so far."""
        assert "step" in row, f"a row of metrics needs its step: {dict(row)}"
        line = json.dumps({name: _writable(value) for name, value in row.items()}, allow_nan=False)
        self._file.write(line.encode("utf-8") + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class GrowingMetrics:
    """The rows of a file that somebody writes: each is read once, however often one looks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[dict[str, Any]] = []
        self._file, self._read = 0, 0
        """Which file it was, since a resumed run puts another in its place, and how many bytes of it are known."""

    def rows(self) -> list[dict[str, Any]]:
        """As `read_metrics` gives them."""
        try:
            with self._path.open("rb") as file:
                return list(self._with_new(file))
        except FileNotFoundError:
            return []

    def _with_new(self, file: BinaryIO) -> list[dict[str, Any]]:
        status = os.fstat(file.fileno())
        if status.st_ino != self._file or status.st_size < self._read:
            self._rows, self._file, self._read = [], status.st_ino, 0
        file.seek(self._read)
        *complete, _ = file.read().split(b"\n")
        for line in complete:
            self._rows.append(_row(line, self._path, len(self._rows) + 1))
            self._read += len(line) + 1
        return self._rows


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows in the order in which they were written; none if there is no file. Raises DataError naming file:line."""
    return [_row(line, path, number) for number, line in enumerate(_complete_lines(path), start=1)]


def _trim(path: Path, keep_through_step: int | None) -> None:
    kept = _complete_lines(path)
    if keep_through_step is not None:
        numbered = enumerate(kept, start=1) if keep_through_step > 0 else ()
        kept = [line for number, line in numbered if _row(line, path, number)["step"] <= keep_through_step]
    content = b"".join(line + b"\n" for line in kept)
    if not path.exists() or path.stat().st_size != len(content):
        write_bytes(path, content)


def _complete_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: not JSON ({error}); remove the line to read the others") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise DataError(
            f"{path}:{number}: not a JSON object with a whole number as its step; remove the line to read the others"
        )
    return {
        name: _NOT_FINITE[value] if isinstance(value, str) and value in _NOT_FINITE else value for name, value in row.items()
    }


def _writable(value: float | int | None) -> float | int | str | None:
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
