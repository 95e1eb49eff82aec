"""The README.md of an exported adapter or model: base, data, recipe, results and licence, as Hugging Face shows them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from orchestrator.plan.plan import Plan, PlannedStage
from orchestrator.report.stage_words import what_learns
from orchestrator.schema import ExportStage, RandomBase, Recipe, TrainStage

_UNSTATED = "Neither the recipe nor the base's folder states a licence; ask the base's own before you pass this on."


@dataclass(frozen=True)
class Given:
    """What a card says that is not in the plan."""

    license: str | None
    """The recipe's, or the base's own."""
    files: Mapping[str, Sequence[str]]
    """Names of the data by the stage that learned from it."""
    command: str


def model_card(recipe: Recipe, plan: Plan, planned: PlannedStage, given: Given, kind: Literal["adapter", "merged"]) -> str:
    """In Markdown, with the metadata that a hub reads at its top."""
    stages = [entry for entry in plan.stages[: planned.number] if entry.record]
    assert isinstance(planned.stage, ExportStage)
    parts = [
        f"---\n{yaml.safe_dump(_metadata(recipe, given, kind), sort_keys=False, allow_unicode=True)}---",
        f"# {recipe.name}",
        _introduction(recipe, kind),
        _use(kind),
        "## How it was made\n\n" + _stages(stages, given),
        f"    {given.command}",
        "## Results\n\n" + (_results(stages) or "Nothing was held out."),
        "## Licence\n\n" + (f"{given.license}" if given.license else _UNSTATED),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(recipe: Recipe, given: Given, kind: Literal["adapter", "merged"]) -> dict[str, Any]:
    license_fields = {"license": given.license} if given.license else {"license": "other", "license_name": "unknown"}
    base = {} if isinstance(recipe.base_model, RandomBase) else {"base_model": _base_name(recipe)}
    return {
        **license_fields,
        **base,
        "library_name": "peft" if kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["orchestrator", recipe.name, *(["lora"] if kind == "adapter" else [])],
    }


def _base_name(recipe: Recipe) -> str:
    assert isinstance(recipe.base_model, str)
    return (
        recipe.base_model.rstrip("/").rsplit("/", 1)[-1]
        if recipe.base_model.startswith(("/", ".", "~"))
        else recipe.base_model
    )


def _introduction(recipe: Recipe, kind: Literal["adapter", "merged"]) -> str:
    base = "a LLaMA of random weights" if isinstance(recipe.base_model, RandomBase) else f"`{_base_name(recipe)}`"
    what = "An adapter for" if kind == "adapter" else "A model made from"
    return f"{what} {base}, in {recipe.precision}, by the recipe `{recipe.name}` with seed {recipe.seed}."


def _use(kind: Literal["adapter", "merged"]) -> str:
    if kind == "merged":
        return (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```'
        )
    return (
        "It belongs to the base that `manifest.json` names by hash (where a vocabulary was extended, that is the `base` "
        "folder of the vocabulary stage), and to the tokenizer in this folder.\n\n"
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        'base = AutoModelForCausalLM.from_pretrained("path/to/the/base")\n'
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")\n```'
    )


def _stages(stages: Sequence[PlannedStage], given: Given) -> str:
    lines = ["| stage | what learned | steps | tokens | data |", "|---|---|---|---|---|"]
    for entry in stages:
        results = entry.record.results if entry.record else {}
        is_trained = isinstance(entry.stage, TrainStage)
        steps, tokens = (f"{results[name]:,}" if is_trained else "" for name in ("steps", "tokens"))
        data = ", ".join(given.files.get(entry.name, ()))
        lines.append(f"| {entry.number} {entry.name} | {what_learns(entry)} | {steps} | {tokens} | {data} |")
    return "\n".join(lines)


def _results(stages: Sequence[PlannedStage]) -> str:
    """Bits per byte of what was held out, after each stage."""
    trained = [(entry.name, entry.record.results["held_out"]) for entry in stages if entry.record and _measured(entry)]
    texts = list(dict.fromkeys(text for _, held_out in trained for text in held_out))
    if not texts:
        return ""
    lines = [f"| bits per byte | {' | '.join(texts)} |", f"|---|{'---|' * len(texts)}"]
    first = trained[0][1]
    lines.append(f"| before | {' | '.join(_bits(first, text, 'before') for text in texts)} |")
    lines += [f"| {name} | {' | '.join(_bits(held_out, text, 'after') for text in texts)} |" for name, held_out in trained]
    return "\n".join(lines)


def _measured(entry: PlannedStage) -> bool:
    return isinstance(entry.stage, TrainStage) and bool(entry.record and entry.record.results.get("held_out"))


def _bits(held_out: dict[str, Any], text: str, when: Literal["before", "after"]) -> str:
    value = held_out.get(text, {}).get(when, {}).get("bits_per_byte")
    return "" if value is None else f"{value:.3f}"
