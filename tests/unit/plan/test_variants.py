"""The recipes of a comparison."""

from typing import Any

import pytest

from orchestrator.errors import RecipeError
from orchestrator.plan.variants import variants
from orchestrator.schema import FullFineTuning, Lora, TrainStage

LORA = {"kind": "lora", "targets": ["q_proj"], "rank": 2, "alpha": 4}


def compare(make_recipe, methods: dict[str, Any], **more: Any):
    return variants(make_recipe({"compare": {"stage": "attention", "methods": methods} | more}))


def test_each_method_is_trained_with_each_seed_on_the_stages_before(make_recipe) -> None:
    tried = compare(make_recipe, {"small": {"method": LORA}, "full": {"method": "full", "steps": 3}}, seeds=[4, 5])
    assert [(each.name, each.seed, each.recipe.seed) for each in tried] == [
        ("small", 4, 4),
        ("small", 5, 5),
        ("full", 4, 4),
        ("full", 5, 5),
    ]
    for each in tried:
        assert list(each.recipe.stages) == ["vocabulary", "embeddings", "attention"]
        assert (each.recipe.stage, each.recipe.compare) == ("attention", None)
        assert each.recipe.name == f"laptop/{each.name}"
    small, full = tried[0].recipe.stages["attention"], tried[2].recipe.stages["attention"]
    assert isinstance(small, TrainStage)
    assert isinstance(full, TrainStage)
    assert small.method == Lora.model_validate(LORA)
    assert (full.method, full.steps, small.steps) == (FullFineTuning(kind="full"), 3, 10)


def test_resources_are_joined_and_the_method_is_another_one(make_recipe) -> None:
    (first, *_) = compare(make_recipe, {"ia3": {"method": "ia3", "resources": {"gradient_checkpointing": True}}})
    stage = first.recipe.stages["attention"]
    assert isinstance(stage, TrainStage)
    assert (stage.resources.micro_batch_size, stage.resources.gradient_checkpointing) == (4, True)


def test_all_that_is_wrong_is_said_at_once(make_recipe) -> None:
    methods = {"a": {"method": LORA | {"rnk": 3}}, "b": {"learning_rate": -1}, "c": {"method": "fulll"}}
    with pytest.raises(RecipeError) as caught:
        compare(make_recipe, methods)
    problems = list(caught.value.problems)
    assert len(problems) == 3
    first, second, third = problems[0], problems[1], problems[2]
    assert first.startswith("compare.methods.a.method.rnk: Extra inputs are not permitted")
    assert second.startswith("compare.methods.b.learning_rate: Input should be greater than 0")
    assert third.startswith("compare.methods.c.method: Input tag 'fulll' found")


def test_what_is_compared_is_a_training_stage(make_recipe) -> None:
    with pytest.raises(
        RecipeError, match=r"^compare\.stage: 'export' is no training stage; choose from embeddings, attention"
    ):
        compare(make_recipe, {"full": {"method": "full"}}, stage="export")
