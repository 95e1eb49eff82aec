"""What a person sees while a stage trains: the pipeline, how far the stage is, its numbers, and what happened to it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.plan.plan import State
from orchestrator.report.words import duration

_RECENT = 10
"""Steps that pace and speed are the mean of."""
_BARS = "▁▂▃▄▅▆▇█"
_CURVE = 40
"""Characters that the loss is drawn in."""
_MARKS = {State.DONE: ("✓", "green"), State.RUN: ("·", "dim"), State.RESUME: ("·", "cyan"), State.SKIP: ("–", "dim")}


@dataclass(frozen=True)
class Seen:
    """What the files of a stage say of it now."""

    rows: Sequence[Mapping[str, Any]] = ()
    """Of its metrics."""
    events: Sequence[Mapping[str, Any]] = ()
    """Of its ledger."""
    evaluations: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Watched:
    """A training stage, among those of its pipeline, and how to look at it."""

    pipeline: str
    stages: Sequence[tuple[str, State]]
    """Of the pipeline, by name, in order."""
    stage: str
    num_steps: int
    look: Callable[[], Seen]


def progress_line(seen: Seen, num_steps: int) -> str | None:
    """All of it in a line; None before the first step."""
    if not seen.rows:
        return None
    last = seen.rows[-1]
    line = (
        f"step {last['step']:,}/{num_steps:,}  loss {last['loss']:.3f}  {_speed(seen.rows)}  {_left(seen, num_steps)} left"
    )
    held_out = _held_out(seen)
    return f"{line}  {held_out}" if held_out else line


def live_view(watched: Watched) -> RenderableType:
    """As the terminal draws it, again and again."""
    seen = watched.look()
    parts: list[RenderableType] = [_pipeline(watched)]
    if not seen.rows:
        parts.append(Text(f"  {_before_first_step(seen)}", "dim"))
        return Group(*parts)
    step = seen.rows[-1]["step"]
    bar = Table.grid(padding=(0, 2))
    line = ProgressBar(watched.num_steps, step, width=_CURVE, complete_style="green")
    bar.add_row(line, f"step {step:,} of {watched.num_steps:,}")
    bar.add_row(Text(_curve([row["loss"] for row in seen.rows]), "cyan"), f"loss {seen.rows[-1]['loss']:.3f}")
    parts += [
        Padding(bar, (0, 0, 0, 2)),
        *(Text(f"  {line}", no_wrap=True, overflow="ellipsis") for line in _numbers(seen, watched.num_steps)),
    ]
    if seen.evaluations and (samples := seen.evaluations[-1].get("samples")):
        parts += [_sample(each) for each in samples]
    return Group(*parts)


def _sample(sample: Mapping[str, str]) -> Text:
    line = f"  {sample['prompt']} → {sample['text']}".replace("\n", " ")
    return Text(line, "dim", no_wrap=True, overflow="ellipsis")


def _pipeline(watched: Watched) -> Text:
    line = Text(f"{watched.pipeline}  ", "bold")
    for name, state in watched.stages:
        mark, style = ("▶", "bold yellow") if name == watched.stage else _MARKS[state]
        line.append(f"{mark} {name}  ", style)
    return line


def _before_first_step(seen: Seen) -> str:
    """What workers do that have not told of a step yet."""
    attempts = sum(event["event"] == "attempt" for event in seen.events)
    learns = any(event["event"] == "learns" for event in seen.events)
    return "first step" if learns else "loading the model" if attempts else "starting workers"


def _numbers(seen: Seen, num_steps: int) -> list[str]:
    last = seen.rows[-1]
    used = f"{last['flops_utilisation']:.0%} of peak" if "flops_utilisation" in last else ""
    pace = (_speed(seen.rows), used, f"{_left(seen, num_steps)} left", f"learning rate {last['learning_rate']:.2g}")
    lines = [pace, (_saved(seen), _restarts(seen)), (_held_out(seen),)]
    return [line for parts in lines if (line := " · ".join(part for part in parts if part))]


def _speed(rows: Sequence[Mapping[str, Any]]) -> str:
    recent = rows[-_RECENT:]
    return f"{sum(row['tokens_per_second'] for row in recent) / len(recent):,.0f} tokens/s"


def _left(seen: Seen, num_steps: int) -> str:
    recent = seen.rows[-_RECENT:]
    return duration((num_steps - recent[-1]["step"]) * sum(row["seconds"] for row in recent) / len(recent))


def _saved(seen: Seen) -> str:
    found = next((event for event in reversed(seen.events) if event["event"] == "checkpoint"), None)
    if found is None:
        return "no checkpoint yet"
    return f"checkpoint of step {found['step']:,}, {duration(max(0.0, time.time() - found['time']))} ago"


def _restarts(seen: Seen) -> str:
    """Of this stage, over all commands."""
    attempts = sum(event["event"] == "attempt" for event in seen.events)
    return "" if attempts < 2 else f"{attempts - 1} restart{'s' if attempts > 2 else ''}"


def _held_out(seen: Seen) -> str:
    if not seen.evaluations:
        return ""
    last = seen.evaluations[-1]
    numbers = [f"{name} {each['bits_per_byte']:.3f}" for name, each in last["held_out"].items()]
    return f"bits per byte at step {last['step']:,}: {', '.join(numbers)}" if numbers else ""


def _curve(values: Sequence[float]) -> str:
    """The losses over the width, from the least to the most."""
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if not finite:
        return ""
    ends = [max(1, round((place + 1) * len(finite) / _CURVE)) for place in range(_CURVE)]
    parts = [finite[min(first, end - 1) : end] for first, end in zip((0, *ends), ends, strict=False)]
    means = [sum(part) / len(part) for part in parts]
    least, most = min(means), max(means)
    scale = (len(_BARS) - 1) / (most - least) if most > least else 0.0
    return "".join(_BARS[round((value - least) * scale)] for value in means)
