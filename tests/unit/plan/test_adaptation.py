"""Each stage's adapter holds everything that differs from the base so far."""

from typing import Any

import pytest

from orchestrator.errors import RecipeError
from orchestrator.plan.adaptation import Adaptation, adaptations
from orchestrator.plan.targets import LoraShape
from tests.llama_layers import LAYERS

SHAPE = LoraShape(rank=8, alpha=32)


def test_adaptations_add_up_over_the_training_stages(recipe) -> None:
    found = adaptations(recipe, LAYERS)
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
    found = adaptations(make_recipe({"stages.instruct.method.targets": ["v_proj", "up_proj"]}), LAYERS)
    assert list(found["instruct"].lora) == ["q_proj", "v_proj", "up_proj"]
    assert found["instruct"].trained_lora == ("v_proj", "up_proj")


def test_stages_may_use_other_ranks_on_other_layers(make_recipe) -> None:
    lora = adaptations(make_recipe({"stages.instruct.method.rank": 4}), LAYERS)["instruct"].lora
    assert lora == {"q_proj": SHAPE, "v_proj": SHAPE, "up_proj": LoraShape(4, 32)}


def test_factors_cannot_change_their_shape_and_every_conflict_is_named(make_recipe) -> None:
    changes = {"stages.instruct.method.targets": ["q_proj", "v_proj", "up_proj"], "stages.instruct.method.rank": 16}
    with pytest.raises(RecipeError) as caught:
        adaptations(make_recipe(changes), LAYERS)
    assert caught.value.problems == tuple(
        f"stages.instruct.method: {target} was given rank 8 and alpha 32 by stages.attention, and goes on with them; "
        "it cannot become rank 16 and alpha 32"
        for target in ("q_proj", "v_proj")
    )


def test_a_conflict_names_the_stage_that_gave_the_shape_first(make_recipe) -> None:
    lora = {"kind": "lora", "targets": ["q_proj"], "rank": 8, "alpha": 32}
    changes = {
        "stages.embeddings.method": lora,
        "stages.attention.method.targets": ["q_proj"],
        "stages.instruct.method": lora | {"alpha": 16},
    }
    with pytest.raises(RecipeError, match=r"^stages\.instruct\.method: q_proj .* by stages\.embeddings, .* alpha 16$"):
        adaptations(make_recipe(changes), LAYERS)


LORA = {"kind": "lora", "targets": ["q_proj"], "rank": 4, "alpha": 8}
MERGE = "put a stage of kind merge between them"


def chain(make_recipe, *methods: object, **changes: object) -> list[Adaptation]:
    """The adaptations of stages with these methods, one after the other; "merge" and "export" stand for such stages."""
    train = {"kind": "train", "objective": "next_token", "block_length": 8, "global_batch_size": 4, "steps": 1}
    train |= {"learning_rate": 1e-3, **changes}
    stages: dict[str, Any] = {
        f"stages.{name}": None for name in ("vocabulary", "embeddings", "attention", "instruct", "export")
    }
    for number, method in enumerate(methods):
        other = {"kind": method} if method in ("merge", "export") else None
        stages[f"stages.s{number}"] = other or train | {"method": method}
    return list(adaptations(make_recipe(stages), LAYERS).values())


def test_a_layer_of_one_block_goes_on_where_all_were_adapted(make_recipe) -> None:
    _, second = chain(make_recipe, LORA, LORA | {"layers_to_transform": [1]})
    assert second.lora == {"q_proj": LoraShape(4, 8)}
    assert second.trained_lora == ("model.layers.1.self_attn.q_proj",)


def test_options_of_all_factors_are_kept_by_stages_without_any(make_recipe) -> None:
    first, second = chain(make_recipe, LORA | {"dora": True, "rslora": True, "dropout": 0.1}, "bitfit")
    assert (first.dora, first.rslora, first.dropout, first.bias) == (True, True, 0.1, "none")
    assert (second.dora, second.rslora, second.dropout, second.bias) == (True, True, 0.0, "all")
    assert (second.trained_lora, second.trained_bias) == ((), "all")


def test_biases_once_learned_are_kept(make_recipe) -> None:
    found = chain(make_recipe, LORA | {"bias": "lora_only"}, LORA, LORA | {"bias": "all"}, LORA | {"bias": "lora_only"})
    assert [(each.bias, each.trained_bias) for each in found] == [
        ("lora_only", "lora_only"),
        ("lora_only", "none"),
        ("all", "all"),
        ("all", "lora_only"),
    ]


def test_what_pissa_took_out_comes_back_as_factors_of_twice_the_rank(make_recipe) -> None:
    first, second = chain(make_recipe, LORA | {"init": "pissa"}, LORA | {"targets": ["v_proj"]})
    assert first.lora == {"q_proj": LoraShape(4, 8)}
    assert first.written_lora == {"q_proj": LoraShape(8, 16)}
    assert second.lora == second.written_lora == {"q_proj": LoraShape(8, 16), "v_proj": LoraShape(4, 8)}


def test_after_a_full_fine_tuning_or_a_merge_an_adapter_begins(make_recipe) -> None:
    full, lora, ia3, last = chain(make_recipe, "full", LORA, "merge", "ia3", "merge", LORA | {"dora": True})
    assert full == Adaptation(full=True)
    assert (lora.lora, lora.full) == ({"q_proj": LoraShape(4, 8)}, False)
    assert ia3 == Adaptation(ia3=("k_proj", "v_proj", "down_proj"), ia3_feedforward=("down_proj",), trains_ia3=True)
    assert (last.ia3, last.dora) == ((), True)


@pytest.mark.parametrize("method", ["ia3", "bottleneck"])
def test_what_has_an_adapter_of_its_own_goes_on_with_it(make_recipe, method: str) -> None:
    first, second = chain(make_recipe, method, method)
    assert first == second


@pytest.mark.parametrize(
    ("methods", "problem"),
    [
        ([LORA, "full"], f"stages.s1.method: full trains the base itself, beside which stages.s0 left an adapter; {MERGE}"),
        ([LORA, "ia3"], f"stages.s1.method: ia3 has an adapter of its own, and stages.s0 left another; {MERGE}"),
        (["ia3", LORA], f"stages.s1.method: lora cannot share an adapter with the ia3 of stages.s0; {MERGE}"),
        (["ia3", "bitfit"], f"stages.s1.method: bitfit cannot share an adapter with the ia3 of stages.s0; {MERGE}"),
        ([LORA, LORA | {"dora": True}], f"stages.s1.method.dora: this stage has it and stages.s0 has not, .* {MERGE}"),
        ([LORA | {"rslora": True}, LORA], f"stages.s1.method.rslora: stages.s0 has it and this stage has not, .* {MERGE}"),
        (
            [LORA, LORA | {"init": "pissa"}],
            f"stages.s1.method.init: pissa begins with the weights alone, and stages.s0 adapted them; {MERGE}",
        ),
        ([LORA, "p_tuning"], f"stages.s1.method: p_tuning has an adapter of its own, and stages.s0 left another; {MERGE}"),
        (["p_tuning", LORA], "stages.s1: nothing can follow the p_tuning of stages.s0, which is in none of the weights"),
        (["p_tuning", "merge"], "stages.s1: the p_tuning of stages.s0 is told to a model and is in none of its weights$"),
        (
            [LORA, "bottleneck"],
            f"stages.s1.method: bottleneck has an adapter of its own, and stages.s0 left another; {MERGE}",
        ),
        (["bottleneck", LORA], "stages.s1: nothing but the same can follow the bottleneck of stages.s0, which no weight"),
        (["bottleneck", "merge"], "stages.s1: the bottleneck of stages.s0 is not linear, and no weight can hold it$"),
        (["bottleneck", "export"], "stages.s1.merged: the bottleneck of stages.s0 .*; set stages.s1.merged=false$"),
        (["p_tuning", "export"], "stages.s1.merged: the p_tuning of stages.s0 .* weights; set stages.s1.merged=false$"),
        (
            [LORA | {"init": "pissa"}, LORA],
            "stages.s1.method: q_proj was given rank 8 and alpha 16 by stages.s0, and goes on with them; it cannot become",
        ),
    ],
)
def test_what_one_adapter_cannot_hold_is_refused_with_a_remedy(make_recipe, methods, problem) -> None:
    with pytest.raises(RecipeError, match=f"^{problem}"):
        chain(make_recipe, *methods)


def test_a_table_learns_as_a_whole_or_through_factors(make_recipe) -> None:
    with pytest.raises(RecipeError, match=r"^stages\.s0: lm_head has low-rank factors and cannot be trained as a whole"):
        chain(make_recipe, LORA | {"targets": ["lm_head"]}, modules_to_save=["lm_head"])
