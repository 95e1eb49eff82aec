"""Each stage's adapter holds everything that differs from the base so far."""

import pytest

from orchestrator.errors import RecipeError
from orchestrator.plan.adaptation import Adaptation, LoraShape, adaptations

SHAPE = LoraShape(rank=8, alpha=32)


def test_adaptations_add_up_over_the_training_stages(recipe) -> None:
    found = adaptations(recipe)
    assert list(found) == ["embeddings", "attention", "instruct"]
    assert found["embeddings"] == Adaptation(modules_to_save=("embed_tokens",), trained_modules=("embed_tokens",))
    assert found["attention"] == Adaptation(
        lora={"q_proj": SHAPE, "v_proj": SHAPE},
        modules_to_save=("embed_tokens",),
        trained_lora=("q_proj", "v_proj"),
        dropout=0.05,
    )
    assert found["instruct"] == Adaptation(
        lora={"q_proj": SHAPE, "v_proj": SHAPE, "up_proj": SHAPE},
        modules_to_save=("embed_tokens", "lm_head"),
        trained_lora=("up_proj",),
        trained_modules=("embed_tokens", "lm_head"),
        dropout=0.05,
    )
    assert list(found["instruct"].lora) == ["q_proj", "v_proj", "up_proj"]


def test_a_later_stage_may_go_on_with_the_same_factors(make_recipe) -> None:
    found = adaptations(make_recipe({"stages.instruct.lora.targets": ["v_proj", "up_proj"]}))
    assert list(found["instruct"].lora) == ["q_proj", "v_proj", "up_proj"]
    assert found["instruct"].trained_lora == ("v_proj", "up_proj")


def test_stages_may_use_other_ranks_on_other_layers(make_recipe) -> None:
    lora = adaptations(make_recipe({"stages.instruct.lora.rank": 4}))["instruct"].lora
    assert lora == {"q_proj": SHAPE, "v_proj": SHAPE, "up_proj": LoraShape(4, 32)}


def test_factors_cannot_change_their_shape_and_every_conflict_is_named(make_recipe) -> None:
    changes = {"stages.instruct.lora.targets": ["q_proj", "v_proj", "up_proj"], "stages.instruct.lora.rank": 16}
    with pytest.raises(RecipeError) as caught:
        adaptations(make_recipe(changes))
    assert caught.value.problems == tuple(
        f"stages.instruct.lora: {target} was given rank 8 and alpha 32 by stages.attention, and goes on with them; "
        "it cannot become rank 16 and alpha 32"
        for target in ("q_proj", "v_proj")
    )


def test_a_conflict_names_the_stage_that_gave_the_shape_first(make_recipe) -> None:
    lora = {"targets": ["q_proj"], "rank": 8, "alpha": 32}
    changes = {
        "stages.embeddings.lora": lora,
        "stages.attention.lora.targets": ["q_proj"],
        "stages.instruct.lora": lora | {"alpha": 16},
    }
    with pytest.raises(RecipeError, match=r"^stages\.instruct\.lora: q_proj .* by stages\.embeddings, .* alpha 16$"):
        adaptations(make_recipe(changes))
