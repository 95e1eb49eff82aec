"""What happened to a stage on its way, in a line for a person."""

from collections.abc import Mapping
from statistics import median
from typing import Any

_IN_WORDS = {
    "worker_lost": ("worker lost", "workers lost"),
    "node_lost": ("node lost", "nodes lost"),
    "hang": ("hang", "hangs"),
    "out_of_memory": ("time out of memory", "times out of memory"),
    "network": ("network failure", "network failures"),
    "storage": ("storage failure", "storage failures"),
    "error": ("error", "errors"),
    "driver_lost": ("driver lost", "drivers lost"),
    "preemption": ("preemption", "preemptions"),
    "resize": ("resize", "resizes"),
}


def described(history: Mapping[str, Any]) -> str:
    """Of a stage's record; empty when nothing happened that one would tell."""
    attempts, failures, recoveries = history["attempts"], history["failures"], history["recovery_seconds"]
    if attempts <= 1 and not failures:
        return ""
    causes = ", ".join(_counted(count, *_IN_WORDS.get(cause, (cause, cause))) for cause, count in failures.items())
    parts = [_counted(attempts, "attempt", "attempts") + (f": {causes}" if causes else "")]
    if history["lost_steps"]:
        parts.append(_counted(history["lost_steps"], "step again", "steps again"))
    if recoveries:
        longest = f" (longest {_duration(max(recoveries))})" if len(recoveries) > 1 else ""
        parts.append(f"recovery {_duration(median(recoveries))}{longest}")
    return "; ".join([*parts, f"goodput {history['goodput']:.0%}".replace("%", " %")])


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
