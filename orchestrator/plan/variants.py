"""The recipes of a comparison: one for each method and seed, the same but for one stage."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import RecipeError
from orchestrator.schema import Comparison, Recipe, TrainStage
from orchestrator.schema.paths import recipe_path


@dataclass(frozen=True)
class Variant:
    """One way to train the stage."""

    name: str
    seed: int
    recipe: Recipe


def variants(recipe: Recipe) -> tuple[Variant, ...]:
    """Method by method, each with all seeds; RecipeError lists what is wrong with any of them."""
    comparison = recipe.compare
    assert comparison
    names = list(recipe.stages)
    stage = recipe.stages.get(comparison.stage)
    if not isinstance(stage, TrainStage):
        trained = [name for name, each in recipe.stages.items() if isinstance(each, TrainStage)]
        raise RecipeError(f"compare.stage: {comparison.stage!r} is no training stage; choose from {', '.join(trained)}")
    before = {name: recipe.stages[name] for name in names[: names.index(comparison.stage)]}
    found, problems = [], []
    for name, changes in comparison.methods.items():
        try:
            varied = TrainStage.model_validate(_changed(stage.model_dump(), changes))
        except ValidationError as error:
            problems += _problems(f"compare.methods.{name}", error)
            continue
        stages = {**before, comparison.stage: varied}
        found += _with_seeds(recipe, comparison, name, {"stages": stages, "stage": comparison.stage, "compare": None})
    if problems:
        raise RecipeError(problems)
    return tuple(found)


def _with_seeds(recipe: Recipe, comparison: Comparison, name: str, update: Mapping[str, Any]) -> Iterator[Variant]:
    for seed in comparison.seeds:
        own = {**update, "seed": seed, "name": f"{recipe.name}/{name}"}
        yield Variant(name, seed, recipe.model_copy(update=own))


def _changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are joined, but for the method, which is another one."""
    joined = {
        key: {**values[key], **change}
        for key, change in changes.items()
        if key != "method" and isinstance(change, Mapping) and isinstance(values.get(key), Mapping)
    }
    return {**values, **changes, **joined}


def _problems(path: str, error: ValidationError) -> Iterator[str]:
    for detail in error.errors():
        # As if it stood in a recipe's stage, whose paths leave out the members of unions.
        inside = recipe_path(["stages", "any", "train", *detail["loc"]]).removeprefix("stages.any")
        yield f"{path}{inside}: {detail['msg'].removeprefix('Value error, ')}"
