"""What an evaluation measured, as a table: a row for each model."""

from collections.abc import Mapping, Sequence
from typing import Any

_MEASURES = {"bits_per_byte": ("bits per byte", ".3f"), "perplexity": ("perplexity", ",.1f")}


def headings(models: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Of what any of the models was measured by."""
    texts = [f"{text}: {name}" for text in _names(models, "held_out") for name, _ in _MEASURES.values()]
    return ("model", *texts, *(f"{task}: {metric}" for task, metric in _task_metrics(models)))


def rows(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """In the order of the headings."""
    return [(model["name"], *_texts(model, models), *_tasks(model, models)) for model in models]


def table(models: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown, with what each model makes of the prompts below it."""
    head = headings(models)
    lines = [head, ("---",) * len(head), *rows(models)]
    parts = ["\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in lines)]
    for prompt in dict.fromkeys(sample["prompt"] for model in models for sample in model["samples"]):
        said = [(model["name"], each["text"]) for model in models for each in model["samples"] if each["prompt"] == prompt]
        parts.append("\n".join([f"**{_cell(prompt)}**", "", *(f"- {name}: {_cell(text)}" for name, text in said)]))
    return "\n\n".join(parts) + "\n"


def _texts(model: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        format(model["held_out"][text][measure], spec) if text in model["held_out"] else ""
        for text in _names(models, "held_out")
        for measure, (_, spec) in _MEASURES.items()
    ]


def _tasks(model: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = []
    for task, metric in _task_metrics(models):
        value = model["tasks"].get(task, {}).get(metric)
        cells.append("" if value is None else f"{value:.3f}")
    return cells


def _names(models: Sequence[Mapping[str, Any]], part: str) -> list[str]:
    return list(dict.fromkeys(name for model in models for name in model[part]))


def _task_metrics(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Those of which a person would ask; standard errors are in the record."""
    found = [(task, metric) for model in models for task, values in model["tasks"].items() for metric in values]
    return [pair for pair in dict.fromkeys(found) if not pair[1].endswith("_stderr")]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
