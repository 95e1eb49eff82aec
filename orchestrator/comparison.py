"""A comparison: one stage trained in several ways, and a table of what each of them costs and brings."""

from collections.abc import Sequence
from pathlib import Path

from orchestrator import assign
from orchestrator.errors import RecipeError
from orchestrator.pipeline import run_pipelines
from orchestrator.plan.inputs import find_inputs
from orchestrator.plan.plan import Plan, PlannedStage
from orchestrator.plan.variants import Variant, variants
from orchestrator.report.comparison import Measured, Yardstick, table
from orchestrator.report.console import Console
from orchestrator.report.words import shown
from orchestrator.run_root import run_root
from orchestrator.schema import Recipe
from orchestrator.stages import bodies
from orchestrator.store import read_json, sha256_value, write_json

_LATENCIES_NAME = "latency.json"


def run_comparison(recipe: Recipe, console: Console, command: str) -> Path:
    """Trains what is not trained yet, and gives the folder with table.md and comparison.svg."""
    from orchestrator.report.plots import plot_comparison  # noqa: PLC0415  a recipe without a plot does not wait for it

    assert recipe.compare
    if not (recipe.validation_instructions or recipe.validation):
        raise RecipeError(
            "compare: nothing is held out to compare by; give validation_instructions for a stage that learns answers, "
            "or validation for one that learns text"
        )
    tried, stage = variants(recipe), recipe.compare.stage
    plans = run_pipelines(
        [variant.recipe for variant in tried], console, command, lambda plans: _show(console, tried, plans, stage)
    )
    trained = [plan.named(stage) for plan in plans]
    folder = run_root(recipe.run_root).local / f"comparison-{sha256_value([each.fingerprint for each in trained])[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    latencies = _latencies(recipe, tried, plans, folder, console)
    measured = [_measured(name, tried, trained, latencies) for name in recipe.compare.methods]
    reference = recipe.compare.reference
    yardstick = Yardstick(reference, recipe.compare.reach) if reference else None
    (folder / "table.md").write_text(table(measured, yardstick), encoding="utf-8")
    plot_comparison(measured, folder / "comparison.svg", yardstick)
    console.show_comparison(measured, yardstick)
    console.say(f"table.md and comparison.svg are in {shown(folder)}")
    return folder


def _show(console: Console, tried: Sequence[Variant], plans: Sequence[Plan], stage: str) -> None:
    rows = []
    for variant, plan in zip(tried, plans, strict=True):
        planned = plan.named(stage)
        rows.append((variant.name, str(variant.seed), planned.state.value, planned.reason))
    console.show_table(("method", "seed", "state", "why"), rows)


def _measured(
    name: str, tried: Sequence[Variant], trained: Sequence[PlannedStage], latencies: dict[str, dict[str, float]]
) -> Measured:
    results = [
        planned.record.results
        for variant, planned in zip(tried, trained, strict=True)
        if variant.name == name and planned.record
    ]
    held_out = "instructions" if "instructions" in results[0]["held_out"] else "validation"
    numbers = [result["held_out"][held_out] for result in results]
    artifact = next(planned for variant, planned in zip(tried, trained, strict=True) if variant.name == name)
    return Measured(
        name=name,
        learns=results[0]["trainable"],
        of=results[0]["parameters"],
        before=numbers[0]["before"]["bits_per_character"],
        after=tuple(each["after"]["bits_per_character"] for each in numbers),
        tokens_per_second=tuple(each["tokens_per_second"] for each in results),
        peak_bytes=max(each["peak_memory_bytes"] for each in results),
        artifact_bytes=_artifact_bytes(artifact),
        seconds_per_token=latencies.get(name, {}),
        base_seconds_per_token=latencies.get("", {}).get("plain"),
    )


def _artifact_bytes(planned: PlannedStage) -> int:
    """Of the weights that the stage left."""
    return sum(path.stat().st_size for path in planned.folder.glob("*/*.safetensors"))


def _latencies(
    recipe: Recipe, tried: Sequence[Variant], plans: Sequence[Plan], folder: Path, console: Console
) -> dict[str, dict[str, float]]:
    """Seconds per written token by method, and of the base by the name of none; measured once, of the first seed."""
    assert recipe.compare
    tokens, file = recipe.compare.latency_tokens, folder / _LATENCIES_NAME
    if not tokens:
        return {}
    if file.is_file():
        return read_json(file)
    from orchestrator.cluster.session import connected, run_task  # noqa: PLC0415

    console.say("measuring what each method costs when it writes")
    found: dict[str, dict[str, float]] = {}
    with connected(recipe.cluster):
        for variant, plan in zip(tried, plans, strict=True):
            if variant.name in found:
                continue
            base, adapter, can_merge = _artifact(variant.recipe, plan, plan.named(recipe.compare.stage))
            if adapter and "" not in found:
                found[""] = run_task(bodies.latency_body, base, None, False, recipe.precision, tokens)
            found[variant.name] = run_task(bodies.latency_body, base, adapter, can_merge, recipe.precision, tokens)
    write_json(file, found)
    return found


def _artifact(recipe: Recipe, plan: Plan, planned: PlannedStage) -> tuple[Path, Path | None, bool]:
    """The model that a variant left or was trained on, its adapter, and whether the two can be merged."""
    assert planned.adaptation
    if planned.is_base:
        return planned.base_folders[0], None, False
    sources = assign.sources_of(run_root(recipe.run_root), find_inputs(recipe), plan, planned)
    return sources.base, planned.folder / "adapter", planned.adaptation.can_merge
