"""Why a stage must run: which field differs from the newest finished stage of the same name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.plan.record import Record, read_record

_MOST_DIFFERENCES = 3


def why_new(name: str, identity: dict[str, Any], folder: Path) -> str:
    """A clause for the plan: never run, or what changed since the newest finished one and which that is."""
    newest = _newest_sibling(name, folder)
    if newest is None:
        return "not finished yet" if folder.is_dir() else "new"
    changes = list(_differences(newest[1].identity, identity))
    shown = ", ".join(changes[:_MOST_DIFFERENCES]) + (", …" if len(changes) > _MOST_DIFFERENCES else "")
    return f"{shown} (against {newest[0].name})"


def _newest_sibling(name: str, folder: Path) -> tuple[Path, Record] | None:
    siblings = [path for path in folder.parent.glob(f"{name}-{'[0-9a-f]' * 12}") if path != folder]
    finished = [(path, record) for path in siblings if (record := read_record(path))]
    return max(finished, key=lambda pair: pair[1].finished, default=None)


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        if key == "parents":
            changed = [parent for parent, fingerprint in (new or {}).items() if (old or {}).get(parent) != fingerprint]
            yield "follows a changed " + " and ".join(changed) if changed else "other parents"
        elif isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}." if key != "stage" else prefix)
        elif _is_hash(old) and _is_hash(new):
            yield f"{prefix}{key} has other content"
        else:
            yield f"{prefix}{key} {old} → {new}"


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64
