"""Which layers LoRA adapts, and with which factors, from names alone."""

from typing import Any

import pytest

from orchestrator.errors import RecipeError
from orchestrator.plan.targets import LoraShape, lora_shapes, shortest
from orchestrator.schema import Lora
from tests.llama_layers import BLOCKS, LAYERS

SHAPE = LoraShape(8, 16)
ATTENTION = [layer for layer in LAYERS if "self_attn" in layer]


def shapes(**options: Any) -> dict[str, LoraShape]:
    lora: dict[str, Any] = {"kind": "lora", "targets": ["q_proj"], "rank": 8, "alpha": 16} | options
    return lora_shapes("method", Lora.model_validate(lora), LAYERS)


def problems(**options: Any) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        shapes(**options)
    return caught.value.problems


def test_a_name_is_that_layer_of_every_block() -> None:
    assert shapes() == {f"model.layers.{number}.self_attn.q_proj": SHAPE for number in range(BLOCKS)}


def test_a_longer_name_is_one_layer() -> None:
    assert list(shapes(targets=["1.self_attn.q_proj"])) == ["model.layers.1.self_attn.q_proj"]


def test_all_linear_is_every_layer_but_the_head() -> None:
    assert list(shapes(targets="all-linear")) == list(LAYERS)


def test_a_word_alone_is_a_pattern_for_whole_names() -> None:
    assert list(shapes(targets=r".*\.self_attn\..*")) == ATTENTION
    assert list(shapes(targets=r".*\.[02]\.mlp\.up_proj")) == [f"model.layers.{number}.mlp.up_proj" for number in (0, 2)]


def test_head_and_embedding_are_adapted_where_they_are_named() -> None:
    assert list(shapes(targets=["lm_head", "embed_tokens"])) == ["lm_head", "model.embed_tokens"]


def test_only_some_blocks() -> None:
    found = shapes(targets="all-linear", layers_to_transform=[0, 2])
    assert list(found) == [layer for layer in LAYERS if ".1." not in layer]
    assert shapes(layers_to_transform=[1], layers_pattern="layers") == {"model.layers.1.self_attn.q_proj": SHAPE}


def test_ranks_and_alphas_by_the_end_of_a_name_or_a_pattern_the_first_that_fits() -> None:
    found = shapes(
        targets=["q_proj", "v_proj"],
        rank_pattern={"2.self_attn.q_proj": 2, "q_proj": 4},
        alpha_pattern={r"model\.layers\.[01]\..*": 99},
    )
    assert {layer.removeprefix("model.layers."): (shape.rank, shape.alpha) for layer, shape in found.items()} == {
        "0.self_attn.q_proj": (4, 99),
        "1.self_attn.q_proj": (4, 99),
        "2.self_attn.q_proj": (2, 16),
        "0.self_attn.v_proj": (8, 99),
        "1.self_attn.v_proj": (8, 99),
        "2.self_attn.v_proj": (8, 16),
    }


ALL = "choose from down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"targets": ["q_prog"]},
            f"method.targets: q_prog names no linear layer of this model; {ALL}, embed_tokens, lm_head",
        ),
        (
            {"targets": "q_proj"},
            "method.targets: q_proj fits the whole name of no linear layer, such as model.layers.0.mlp.down_proj; "
            "names are given as a list: [q_proj]",
        ),
        ({"targets": "q_proj("}, "method.targets: q_proj( is no regular expression: "),
        ({"layers_to_transform": [3]}, "method.layers_to_transform: there is no block 3; they are 0 to 2"),
        (
            {"layers_to_transform": [1], "layers_pattern": "h"},
            "method.layers_pattern: h is in no layer's name, such as model.layers.0.self_attn.q_proj",
        ),
        (
            {"rank_pattern": {"v_proj": 2}},
            "method.rank_pattern: v_proj fits none of the layers that are adapted; choose",
        ),
        ({"alpha_pattern": {"proj": 2}}, "method.alpha_pattern: proj fits none of the layers that are adapted; choose from"),
    ],
)
def test_what_fits_no_layer_is_named(options: dict[str, Any], problem: str) -> None:
    (found,) = problems(**options)
    assert found.startswith(problem)


def test_layers_that_are_all_alike_are_written_by_their_last_name() -> None:
    found = shapes(targets=["q_proj", "v_proj", "lm_head"], rank_pattern={"1.self_attn.v_proj": 2})
    assert shortest(found, LAYERS) == {
        "q_proj": SHAPE,
        "lm_head": SHAPE,
        "model.layers.0.self_attn.v_proj": SHAPE,
        "model.layers.1.self_attn.v_proj": LoraShape(2, 16),
        "model.layers.2.self_attn.v_proj": SHAPE,
    }
