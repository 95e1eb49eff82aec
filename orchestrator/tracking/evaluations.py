"""What was measured while a stage trained: held-out numbers and samples by step, one JSON object per line.

There are few of them, so the file is written anew each time, and a resumed run replaces what it measures again.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.store import write_bytes

EVALUATIONS_NAME = "evaluations.jsonl"


def write_evaluations(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Each with its `step`, `time`, `held_out` numbers by the name of the set, and `samples` (`prompt`, `text`)."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_bytes(path, "".join(f"{line}\n" for line in lines).encode("utf-8"))


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """None where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
