"""A sweep: one pipeline for each combination of words, in order, on the same workers. What several share runs once."""

from collections.abc import Sequence

from orchestrator.compose import compose
from orchestrator.errors import RecipeError
from orchestrator.pipeline import run_pipelines
from orchestrator.plan.plan import Plan, PlannedStage
from orchestrator.report.console import Console
from orchestrator.schema import Recipe, TrainStage

_ALIKE = ("run_root", "cluster", "workers", "zero", "recovery", "preflight", "tracking")
"""Words of a command, of which one serves all of them."""


def run_sweep(recipes: Sequence[Recipe], names: Sequence[str], console: Console, command: str) -> list[Plan]:
    """`names` say of each recipe in what it differs. RecipeError where two of them are the same."""
    plans = run_pipelines(recipes, console, command, lambda plans: _show(console, names, plans))
    if recipes[0].preflight == "first":
        console.show_table(*_table(names, plans))
        console.say(f"python launch/report.py {recipes[0].run_root} draws them beside each other")
    return plans


def swept_recipes(combinations: Sequence[Sequence[str]]) -> list[Recipe]:
    """One for each; RecipeError lists what is wrong with any of them, or what does not go with a sweep."""
    recipes, problems = [], []
    for words in combinations:
        try:
            recipes.append(compose(words))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(dict.fromkeys(problems))
    first = recipes[0]
    for word in _ALIKE:
        if any(getattr(recipe, word) != getattr(first, word) for recipe in recipes):
            raise RecipeError(
                f"{word}: one command has one; a sweep varies what is learned, such as a stage's learning_rate"
            )
    if first.compare:
        raise RecipeError("recipe: compares methods by itself (compare.methods); a sweep cannot do so again")
    if first.supervise:
        raise RecipeError("supervise: watches over one pipeline; leave it out of a sweep")
    return recipes


def _show(console: Console, names: Sequence[str], plans: Sequence[Plan]) -> None:
    """What each will run; RecipeError where two of them are the same."""
    seen: dict[tuple[str, ...], str] = {}
    for name, plan in zip(names, plans, strict=True):
        marks = tuple(planned.fingerprint for planned in plan.stages)
        if marks in seen:
            raise RecipeError(f"{seen[marks]} and {name} learn the same; a sweep varies what is learned")
        seen[marks] = name
    rows = [
        (name, planned.name, planned.state.value, planned.reason)
        for name, plan in zip(names, plans, strict=True)
        for planned in plan.to_run
    ]
    console.show_table(("combination", "stage", "state", "why"), rows)


def _table(names: Sequence[str], plans: Sequence[Plan]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """What came of the last stage that learned, by combination."""
    last = [_last_trained(plan) for plan in plans]
    texts = list(dict.fromkeys(text for planned in last if planned for text in _after(planned)))
    headings: tuple[str, ...] = ("combination", "stage", *(f"{text}: bits per character" for text in texts))
    rows: list[tuple[str, ...]] = []
    for name, planned in zip(names, last, strict=True):
        if planned:
            numbers = _after(planned)
            rows.append((name, planned.folder.name, *(f"{numbers[text]:.3f}" if text in numbers else "" for text in texts)))
    return headings, rows


def _last_trained(plan: Plan) -> PlannedStage | None:
    trained = [planned for planned in plan.stages if isinstance(planned.stage, TrainStage) and planned.record]
    return trained[-1] if trained else None


def _after(planned: PlannedStage) -> dict[str, float]:
    assert planned.record
    return {text: each["after"]["bits_per_character"] for text, each in planned.record.results["held_out"].items()}
