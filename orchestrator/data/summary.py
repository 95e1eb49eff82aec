"""What prepared data amounts to. Its data.json is written last, so a folder that has one is whole."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.data.storage import ARRAYS
from orchestrator.store import read_json, sha256_file, write_json

Objective = Literal["next_token", "answers", "held_out", "held_out_answers"]
"""What the rows are for: learning text, learning the answers to instructions, or measuring the loss on either."""

_SUMMARY_FILE = "data.json"


@dataclass(frozen=True)
class Summary:
    """The counts of one prepared data folder."""

    objective: Objective
    block_length: int
    documents: int
    """Documents or instructions."""
    characters: int
    rows: int
    tokens: int
    targets: int
    """Positions with loss."""
    truncated: int
    """Instructions that were too long for a row."""
    text_bytes: int = 0
    """In UTF-8, of what a loss is measured on; 0 of what is learned."""
    duplicates: int = 0
    """Copies of earlier ones, which were left out."""
    bad: int = 0
    """Records that could not be read and were skipped."""
    complaints: tuple[str, ...] = ()
    """What was wrong with the first of them."""

    @property
    def fill_rate(self) -> float:
        """Share of the rows' positions that hold tokens."""
        return self.tokens / (self.rows * self.block_length)

    def __str__(self) -> str:
        what = "instructions" if self.objective.endswith("answers") else "documents"
        cut = f", {self.truncated:,} of them cut to fit" if self.truncated else ""
        left_out = [f"{self.duplicates:,} copies"] * bool(self.duplicates) + [f"{self.bad:,} bad records"] * bool(self.bad)
        cut += f", without {' and '.join(left_out)}" if left_out else ""
        where = f"{self.rows:,} sequences of {self.block_length:,}, {self.fill_rate:.1%} full"
        return f"{self.documents:,} {what}, {self.tokens:,} tokens{cut}; {where}"


def write_summary(folder: Path, summary: Summary, identity: dict[str, Any]) -> None:
    """Completes a folder; `identity` is what its key was made from."""
    arrays = {name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size} for name in ARRAYS}
    counts = asdict(summary) | {"fill_rate": round(summary.fill_rate, 6)}
    write_json(folder / _SUMMARY_FILE, {"identity": identity, "counts": counts, "arrays": arrays})


def read_summary(folder: Path) -> Summary | None:
    """The summary of a complete folder, or None."""
    if not (folder / _SUMMARY_FILE).is_file():
        return None
    try:
        written = read_json(folder / _SUMMARY_FILE)
    except json.JSONDecodeError:
        return None
    arrays = written["arrays"]
    if arrays.keys() != set(ARRAYS):
        return None
    for name, array in arrays.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != array["bytes"]:
            return None
    counts = written["counts"]
    del counts["fill_rate"]
    complaints = tuple(counts.pop("complaints"))
    return Summary(**counts, complaints=complaints)
