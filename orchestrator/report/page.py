"""A run root as one page that works without a network: lineage, curves, numbers, what happened, and how it was made."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from orchestrator.report import evaluation
from orchestrator.report.charts import Line, line_chart, lineage
from orchestrator.report.diff import StageDifference
from orchestrator.report.history import described
from orchestrator.report.story import Story
from orchestrator.report.variants import variants
from orchestrator.report.words import duration, size

GENERATOR = "orchestrator launch/report.py"
"""By this a page of ours is known, which the next may replace."""
_TEMPLATE = Path(__file__).with_name("page.html.jinja")
_CURVES = (
    ("learning rate", "learning_rate", 1.0, ""),
    ("throughput", "tokens_per_second", 1.0, "tokens per second"),
    ("memory of rank 0", "memory_bytes", 1e-9, "GB"),
    ("gradient norm", "gradient_norm", 1.0, ""),
)
_TOLD = ("attempt", "resumed", "failure", "stop", "damaged", "checkpoint_failed", "finish")


@dataclass(frozen=True)
class HeldOutTable:
    """Sets across, stages down."""

    names: list[str]
    rows: list[tuple[str, list[str]]]
    """Before and after for each set, by the stage's folder."""


def page(
    title: str,
    subtitle: str,
    stories: Sequence[Story],
    differences: Sequence[StageDifference] = (),
    names: tuple[str, str] = ("", ""),
) -> str:
    """HTML with everything in it. `names` are those of the two runs that `differences` are between."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= _FILTERS
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        generator=GENERATOR,
        title=title,
        subtitle=subtitle,
        stories=stories,
        lineage=Markup(lineage(stories)),
        held_out=held_out_table(stories),
        evaluations=[
            (story, evaluation.headings(story.results["models"]), evaluation.rows(story.results["models"]))
            for story in stories
            if story.kind == "evaluate" and "models" in story.results
        ],
        variants=variants(stories),
        charts={story.folder: _charts(story) for story in stories},
        differences=differences,
        overlays={each.name: _overlays(each) for each in differences},
        names=names,
    )


def held_out_table(stories: Sequence[Story]) -> HeldOutTable:
    """Bits per byte of every set that any stage measured."""
    names = list(dict.fromkeys(name for story in stories for name in story.held_out))
    rows = [
        (story.folder, [_bits(story, name, when) for name in names for when in ("before", "after")])
        for story in stories
        if story.held_out
    ]
    return HeldOutTable(names, rows)


def _bits(story: Story, name: str, when: str) -> str:
    numbers = story.held_out.get(name, {}).get(when, {})
    value = numbers.get("bits_per_byte", numbers.get("bits_per_character"))
    return "" if value is None else f"{value:.3f}"


def _charts(story: Story) -> list[Markup]:
    rows = story.rows
    held_out = [
        Line(
            name,
            [(row["step"], row["held_out"][name]["loss"]) for row in story.evaluations if name in row["held_out"]],
            True,
        )
        for name in dict.fromkeys(name for row in story.evaluations for name in row["held_out"])
    ]
    drawn = [line_chart("loss", [Line("training", _points(rows, "loss")), *held_out], "nats per token")]
    drawn += [line_chart(title, [Line(title, _points(rows, name, factor))], unit) for title, name, factor, unit in _CURVES]
    return [Markup(chart) for chart in drawn if chart]


def _overlays(each: StageDifference) -> list[Markup]:
    if not each.first or not each.second or each.is_same:
        return []
    drawn = [
        line_chart(title, [Line(mark, _points(story.rows, name)) for mark, story in (("A", each.first), ("B", each.second))])
        for title, name in (("loss", "loss"), ("tokens per second", "tokens_per_second"))
    ]
    return [Markup(chart) for chart in drawn if chart]


def _points(rows: Sequence[Any], name: str, factor: float = 1.0) -> list[tuple[float, float]]:
    return [(row["step"], row[name] * factor) for row in rows if isinstance(row.get(name), int | float)]


def _facts(story: Story) -> list[str]:
    """What there is to say of it in a line."""
    results, facts = story.results, []
    if "trainable" in results:
        facts.append(f"{results['trainable']:,} of {results['parameters']:,} parameters learned")
    if "tokens" in results:
        facts.append(f"{results['tokens']:,} tokens")
    if results.get("kept_step", results.get("steps")) != results.get("steps"):
        facts.append(f"the state of step {results['kept_step']:,} was kept")
    if "tokens_per_second" in results:
        facts.append(f"{results['tokens_per_second']:,.0f} tokens/s")
    if "peak_memory_bytes" in results:
        facts.append(f"{size(results['peak_memory_bytes'])} at most in a worker")
    if "workers" in results:
        facts.append(f"{results['workers']} workers, ZeRO-{results['zero']}")
    if "merged_logit_difference" in results:
        facts.append(f"merged and adapter differ by at most {results['merged_logit_difference']:.2g} of the largest logit")
    if story.history and (happened := described(story.history)):
        facts.append(happened)
    return facts


def _parts(story: Story) -> list[tuple[str, float]]:
    """The parts of a typical step as shares, the largest first."""
    step = story.results.get("step", {})
    whole = step.get("seconds")
    if not whole:
        return []
    parts = [(name.removesuffix("_seconds"), value / whole) for name, value in step.items() if name.endswith("_seconds")]
    return sorted((part for part in parts if part[1] >= 0.005), key=lambda part: -part[1])


def _sampled(story: Story) -> list[tuple[str, list[tuple[int, str]]]]:
    """What became of each prompt, step by step."""
    found: dict[str, list[tuple[int, str]]] = {}
    for row in story.evaluations:
        for sample in row.get("samples", ()):
            found.setdefault(sample["prompt"], []).append((row["step"], sample["text"]))
    return list(found.items())


def _written(story: Story) -> list[tuple[str, list[tuple[str, str]]]]:
    """What each model that was measured made of each prompt."""
    found: dict[str, list[tuple[str, str]]] = {}
    for model in story.results.get("models", ()):
        for sample in model["samples"]:
            found.setdefault(sample["prompt"], []).append((model["name"], sample["text"]))
    return list(found.items())


def _happened(story: Story) -> list[tuple[str, str]]:
    """Nothing of a stage that was begun and finished once."""
    told = [event for event in story.events if event["event"] in _TOLD]
    if sum(event["event"] == "attempt" for event in told) < 2 and not any(event["event"] == "failure" for event in told):
        return []
    return [(_when(event["time"]), _in_words(event)) for event in told]


def _in_words(event: Any) -> str:
    known = ("cause", "reason", "rank", "node", "step", "workers", "micro_batch_size", "message", "what", "error")
    return ", ".join([event["event"].replace("_", " "), *(f"{name} {event[name]}" for name in known if name in event)])


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M:%S}"


def _steps(story: Story) -> str:
    steps = story.results.get("steps") or (story.rows[-1]["step"] if story.rows else None)
    return f"{steps:,}" if steps else ""


def _restarts(story: Story) -> str:
    attempts = sum(event["event"] == "attempt" for event in story.events)
    return str(attempts - 1) if attempts else ""


_FILTERS: dict[str, Callable[[Story], Any]] = {
    "facts": _facts,
    "parts": _parts,
    "sampled": _sampled,
    "happened": _happened,
    "written": _written,
    "steps": _steps,
    "restarts": _restarts,
    "time": lambda story: duration(story.results["seconds"]) if "seconds" in story.results else "",
    "goodput": lambda story: f"{story.history['goodput']:.0%}" if story.rows and story.history else "",
    "finished": lambda story: _when(story.finished) if story.finished else "",
    "identity": lambda story: json.dumps(story.identity, indent=2, ensure_ascii=False),
}
