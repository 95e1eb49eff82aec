"""Counts from a model's configuration alone are those of the model, whatever learns."""

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.plan.adaptation import Adaptation
from orchestrator.plan.forecast import step_flops
from orchestrator.plan.shape import ModelShape, learned, shape_of
from orchestrator.plan.targets import LoraShape
from orchestrator.schema import Bottleneck, PrefixTuning, PromptTuning, RandomBase, Subspace, TrainStage

SHAPE = ModelShape(16, 24, 2, 4, 2, 4, 50, attention_biases=True, mlp_biases=True)
NEW_ROWS = 10
LORA = Adaptation(lora={"q_proj": LoraShape(4, 8), "down_proj": LoraShape(2, 8)}, trained_lora=("q_proj", "down_proj"))
ADAPTATIONS = {
    "lora": LORA,
    "an earlier stage's": replace(LORA, trained_lora=("down_proj",)),
    "dora": replace(LORA, dora=True),
    "tables": replace(LORA, modules_to_save=("embed_tokens", "lm_head"), trained_modules=("embed_tokens", "lm_head")),
    "rows": Adaptation(rows_to_save=("embed_tokens",), trained_rows=("embed_tokens",)),
    "on tables": Adaptation(
        lora={"embed_tokens": LoraShape(4, 8), "lm_head": LoraShape(4, 8)}, trained_lora=("embed_tokens", "lm_head")
    ),
    "one block": Adaptation(
        lora={"model.layers.1.mlp.up_proj": LoraShape(4, 8)}, trained_lora=("model.layers.1.mlp.up_proj",)
    ),
    "bitfit": Adaptation(bias="all", trained_bias="all"),
    "ia3": Adaptation(ia3=("k_proj", "v_proj", "down_proj"), ia3_feedforward=("down_proj",), trains_ia3=True),
    "houlsby": Adaptation(bottleneck=Bottleneck(kind="bottleneck", size=3)),
    "pfeiffer": Adaptation(bottleneck=Bottleneck(kind="bottleneck", placement="pfeiffer", size=3)),
    "prompt": Adaptation(prompt=PromptTuning(kind="prompt_tuning", virtual_tokens=5)),
    "prefix": Adaptation(prompt=PrefixTuning(kind="prefix_tuning", virtual_tokens=5)),
    "full": Adaptation(full=True),
    "subspace": Adaptation(full=True, subspace=Subspace(kind="subspace", dimension=20)),
}


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_counts_are_those_of_the_model(name: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    from orchestrator.model.adapters import attach, count_parameters  # noqa: PLC0415

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True)
    model = LlamaForCausalLM(config)
    assert count_parameters(model)[1] == SHAPE.parameters
    attach(model, ADAPTATIONS[name], seed=1, base_tokens=50 - NEW_ROWS)
    found = learned(SHAPE, ADAPTATIONS[name], NEW_ROWS)
    assert (found.trainable, SHAPE.parameters + found.added) == count_parameters(model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["lora", "tables", "full"])
def test_operations_are_those_that_a_run_counts(name: str, checkpointing: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    from orchestrator.model import flops  # noqa: PLC0415
    from orchestrator.model.adapters import attach  # noqa: PLC0415
    from orchestrator.model.loss import SummedLoss  # noqa: PLC0415

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    attach(model, ADAPTATIONS[name], seed=1)
    given = {"block_length": 8, "global_batch_size": 4, "steps": 1, "learning_rate": 1e-3, "method": "full"}
    resources = {"gradient_checkpointing": checkpointing}
    stage = TrainStage.model_validate({"kind": "train", "objective": "next_token", "resources": resources} | given)
    expected = flops.step_flops(SummedLoss(model), checkpointing).of(32, 32, 4.5)
    plain = replace(SHAPE, attention_biases=False, mlp_biases=False)
    assert step_flops(plain, learned(plain, ADAPTATIONS[name], 0), stage) == pytest.approx(expected)


def test_a_tied_head_is_counted_once_until_the_vocabulary_grows() -> None:
    tied = replace(SHAPE, tied=True)
    assert SHAPE.parameters - tied.parameters == 50 * 16
    assert tied.with_rows(64).parameters == replace(SHAPE, rows=64).parameters


def test_a_shape_comes_from_a_configuration_a_random_base_or_a_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, '
        '"num_key_value_heads": 2, "vocab_size": 50, "attention_bias": true, "mlp_bias": true}'
    )
    assert shape_of(tmp_path) == SHAPE
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4, "num_key_value_heads": 2}
    random = RandomBase.model_validate({"kind": "random", "text": ["x"], "pieces": 50, "max_positions": 64} | sizes)
    assert shape_of(random) == replace(SHAPE, attention_biases=False, mlp_biases=False)
    seven = shape_of("huggyllama/llama-7b")
    assert seven
    assert seven.parameters == 6_738_415_616
    assert shape_of("someone/else") is None
