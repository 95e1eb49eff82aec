"""What attaching an adaptation leaves to be trained, and what it refuses."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.errors import RecipeError
from orchestrator.model.adapters import adapter_parameters, adapter_tensors, attach, count_parameters, peft_config
from orchestrator.plan.adaptation import Adaptation
from orchestrator.plan.targets import LoraShape

BOTH = ("embed_tokens", "lm_head")
SECOND_STAGE = Adaptation(
    lora={"q_proj": LoraShape(4, 16), "v_proj": LoraShape(4, 16), "up_proj": LoraShape(2, 2)},
    modules_to_save=BOTH,
    trained_lora=("up_proj",),
    trained_modules=("lm_head",),
    dropout=0.5,
)
IDS = torch.arange(20).reshape(2, 10)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )


def parameters(model: nn.Module, part: str) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if part in name]


def test_only_what_the_stage_declares_requires_gradients(model):
    attach(model, SECOND_STAGE, seed=1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = {f"model.layers.{n}.mlp.up_proj.lora_{factor}.default.weight" for n in (0, 1) for factor in "AB"}
    assert trained == factors | {"lm_head.weight"}


def test_an_adapter_holds_what_earlier_stages_trained_as_well(model):
    attach(model, SECOND_STAGE, seed=1)
    held = set(adapter_tensors(dict.fromkeys(adapter_parameters(model, SECOND_STAGE), torch.ones(1)), SECOND_STAGE))
    stems = [f"model.layers.{n}.{name}" for n in (0, 1) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]
    names = [*(f"{stem}.lora_{factor}" for stem in stems for factor in "AB"), "model.embed_tokens", "lm_head"]
    assert held == {f"base_model.model.{name}.weight" for name in names}


def test_an_unknown_target_names_itself_and_the_choices(model):
    adaptation = Adaptation(lora={"q_prog": LoraShape(4, 8)}, trained_lora=("q_prog",))
    with pytest.raises(RecipeError) as raised:
        attach(model, adaptation, seed=1)
    assert str(raised.value) == (
        "targets: q_prog names no layer of this model; "
        "choose from down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    )


@torch.no_grad()
def test_dropout_disturbs_the_trained_factors_and_no_frozen_ones(model):
    attach(model, SECOND_STAGE, seed=1)
    model.train()
    for factor in parameters(model, "q_proj.lora_B") + parameters(model, "v_proj.lora_B"):
        factor.fill_(0.1)
    first, second = (model(IDS).logits for _ in range(2))
    assert torch.equal(first, second)
    for factor in parameters(model, "up_proj.lora_B"):
        factor.fill_(0.1)
    first, second = (model(IDS).logits for _ in range(2))
    assert not torch.equal(first, second)


@torch.no_grad()
def test_attaching_changes_nothing_that_the_model_computes(model):
    before = model(IDS).logits
    attach(model, SECOND_STAGE, seed=1)
    assert torch.equal(model.eval()(IDS).logits, before)


def test_factors_depend_on_the_seed_alone(model):
    copies = [copy.deepcopy(model) for _ in range(3)]
    for number, (each, seed) in enumerate(zip(copies, (1, 1, 2), strict=True)):
        torch.manual_seed(number)
        attach(each, SECOND_STAGE, seed)
    first, again, other = ([factor.detach() for factor in parameters(each, "lora_A")] for each in copies)
    assert len(first) == 6
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_factors_have_the_dtype_of_the_model(model):
    attach(model.bfloat16(), SECOND_STAGE, seed=1)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_counts_are_elements(model):
    _, base = count_parameters(model)
    attach(model, SECOND_STAGE, seed=1)
    mlp, attention = 2 * 2 * (16 + 32), 2 * 2 * 4 * (16 + 16)
    assert count_parameters(model) == (mlp + 50 * 16, base + mlp + attention)


def test_ranks_other_than_the_common_one_go_into_patterns():
    config = peft_config(SECOND_STAGE)
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha) == (4, 16)
    assert config.rank_pattern == {"up_proj": 2}
    assert config.alpha_pattern == {"up_proj": 2}
