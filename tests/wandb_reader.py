"""Reads back what wandb wrote offline: a `.wandb` file is a header, then LevelDB log records that hold protobuf messages."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# protobuf makes the class when it is imported.
from wandb.proto.wandb_internal_pb2 import Record  # pyrefly: ignore[missing-module-attribute]

_BLOCK_BYTES = 1 << 15
_FILE_HEADER_BYTES = 7
_RECORD_HEADER = struct.Struct("<IHB")  # checksum, length, kind
_WHOLE, _LAST_PART = 1, 4


@dataclass
class OfflineRun:
    """One attempt, as `wandb sync` would upload it."""

    id: str = ""
    name: str = ""
    project: str = ""
    group: str = ""
    job_type: str = ""
    tags: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    """What was logged, without wandb's own _step, _timestamp and _runtime."""
    summary: dict[str, Any] = field(default_factory=dict)
    step_metrics: dict[str, str] = field(default_factory=dict)
    """The metric that is the horizontal axis, by the glob of the metrics it serves."""
    exit_code: int | None = None
    kinds: set[str] = field(default_factory=set)
    """The kinds of records in the file."""


def read_offline_runs(folder: Path) -> list[OfflineRun]:
    """All attempts below a folder, oldest first."""
    return [read_offline_run(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]


def read_offline_run(path: Path) -> OfflineRun:
    run = OfflineRun()
    for record in read_records(path):
        kind = record.WhichOneof("record_type")
        run.kinds.add(kind)
        if kind == "run":
            told = record.run
            run.id, run.name, run.project = told.run_id, told.display_name, told.project
            run.group, run.job_type, run.tags = told.run_group, told.job_type, tuple(told.tags)
            run.config |= _values(told.config.update)
        elif kind == "history":
            run.history.append(_values(record.history.item))
        elif kind == "summary":
            run.summary |= _values(record.summary.update)
        elif kind == "metric" and record.metric.glob_name:
            run.step_metrics[record.metric.glob_name] = record.metric.step_metric
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def read_records(path: Path) -> Iterator[Record]:
    content, position, message = path.read_bytes(), _FILE_HEADER_BYTES, b""
    assert content.startswith(b":W&B"), f"not a .wandb file: {path}"
    while position + _RECORD_HEADER.size <= len(content):
        left_in_block = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left_in_block < _RECORD_HEADER.size:
            position += left_in_block
            continue
        _, length, kind = _RECORD_HEADER.unpack_from(content, position)
        start = position + _RECORD_HEADER.size
        position = start + length
        message += content[start:position]
        if kind in (_WHOLE, _LAST_PART):
            yield Record.FromString(message)
            message = b""


def _values(items: Any) -> dict[str, Any]:
    named = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
    return {name: value for name, value in named.items() if not name.startswith("_")}
