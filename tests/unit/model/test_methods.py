"""Each option of a method changes what its name says, in the tensors, and the model computes the same as before."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.model.adapters import (
    adapter_parameters,
    adapter_tensors,
    attach,
    beginnings,
    count_by_kind,
    count_parameters,
    load_tensors,
    merge_rule,
    peft_config,
    second_factors,
)
from orchestrator.model.loss import SummedLoss
from orchestrator.plan.adaptation import Adaptation
from orchestrator.plan.targets import LoraShape
from orchestrator.schema import PrefixTuning, PromptTuning, PTuning

IDS = torch.arange(20).reshape(2, 10)
BLOCKS = 2
Q = Adaptation(lora={"q_proj": LoraShape(4, 8)}, trained_lora=("q_proj",))
METHODS = {
    "lora": Q,
    "rank one": replace(Q, lora={"q_proj": LoraShape(1, 8)}),
    "rslora": replace(Q, rslora=True),
    "dora": replace(Q, dora=True),
    "gaussian": replace(Q, init="gaussian"),
    "pissa": replace(Q, init="pissa"),
    "pissa with rslora": replace(Q, init="pissa", rslora=True),
    "one block": replace(
        Q, lora={"model.layers.1.self_attn.q_proj": LoraShape(4, 8)}, trained_lora=("model.layers.1.self_attn.q_proj",)
    ),
    "tables": Adaptation(
        lora={"embed_tokens": LoraShape(4, 8), "lm_head": LoraShape(2, 8)}, trained_lora=("embed_tokens", "lm_head")
    ),
    "biases": replace(Q, bias="all", trained_bias="all"),
    "its biases": replace(Q, bias="lora_only", trained_bias="lora_only"),
    "bitfit": Adaptation(bias="all", trained_bias="all"),
    "ia3": Adaptation(ia3=("k_proj", "down_proj"), ia3_feedforward=("down_proj",), trains_ia3=True),
    "full": Adaptation(full=True),
}


def new_model() -> LlamaForCausalLM:
    """One with biases, which differ from zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        attention_bias=True,
        mlp_bias=True,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.fixture
def base() -> LlamaForCausalLM:
    return new_model()


def attached(name: str) -> LlamaForCausalLM:
    model = new_model()
    attach(model, METHODS[name], seed=1)
    return model.eval()


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def stir(model: nn.Module) -> None:
    """What training would do, in no particular direction."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in learning(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def layer(model: nn.Module, name: str = "model.layers.0.self_attn.q_proj") -> Any:
    return model.get_submodule(name)


def written(model: nn.Module, adaptation: Adaptation) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    named = {name: parameters[name].detach() for name in adapter_parameters(model, adaptation)}
    return adapter_tensors(named, adaptation, beginnings=beginnings(model))


@pytest.mark.parametrize("name", METHODS)
def test_the_first_forward_is_the_bases(base: LlamaForCausalLM, name: str) -> None:
    torch.testing.assert_close(logits(attached(name)), logits(base), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_all_that_is_declared_gets_a_gradient_under_our_loss_and_nothing_else(name: str) -> None:
    model = attached(name)
    stir(model)
    SummedLoss(model)(IDS, IDS).backward()
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any().item()) == parameter.requires_grad, parameter_name


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_merged_into_the_base_it_computes_the_same(base: LlamaForCausalLM, name: str) -> None:
    model, adaptation = attached(name), METHODS[name]
    stir(model)
    expected = logits(model)
    assert not torch.allclose(expected, logits(base), atol=1e-3)
    adapter = {key.replace(".base_layer.", "."): tensor for key, tensor in written(model, adaptation).items()}
    rule, unused = merge_rule(peft_config(adaptation, Path("base"))), set(adapter)
    merged = {key: rule.merged(key, tensor, adapter, unused) for key, tensor in base.state_dict().items()}
    assert unused == set()
    base.load_state_dict(merged)
    torch.testing.assert_close(logits(base), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if "pissa" not in name and name != "full"])
def test_the_next_stage_goes_on_with_it(name: str) -> None:
    model, adaptation = attached(name), METHODS[name]
    stir(model)
    other = new_model()
    attach(other, adaptation, seed=5)
    load_tensors(other, written(model, adaptation))
    assert torch.equal(logits(other.eval()), logits(model))


@pytest.mark.parametrize("name", [name for name in METHODS if "pissa" in name])
def test_what_pissa_learned_goes_on_as_plain_factors(name: str) -> None:
    model, adaptation = attached(name), METHODS[name]
    stir(model)
    other = new_model()
    attach(other, replace(adaptation, init="kaiming", lora=adaptation.written_lora), seed=5)
    load_tensors(other, written(model, adaptation))
    torch.testing.assert_close(logits(other.eval()), logits(model), rtol=1e-4, atol=1e-5)


def test_a_layer_is_w_x_plus_alpha_over_r_b_a_x(base: LlamaForCausalLM) -> None:
    x = torch.randn(3, 16)
    for name, scale in (("lora", 8 / 4), ("rank one", 8 / 1), ("rslora", 8 / 2)):
        model = attached(name)
        assert not any(parameter.any() for each, parameter in learning(model).items() if "lora_B" in each)
        stir(model)
        module = layer(model)
        first, second = (factors["default"].weight for factors in (module.lora_A, module.lora_B))
        expected = layer(base)(x) + scale * x @ first.T @ second.T
        torch.testing.assert_close(module(x), expected)


def test_dora_learns_a_length_for_each_row(base: LlamaForCausalLM) -> None:
    model = attached("dora")
    weight = layer(base).weight
    torch.testing.assert_close(layer(model).lora_magnitude_vector["default"].weight, weight.norm(dim=1))
    stir(model)
    module, x = layer(model), torch.randn(3, 16)
    first, second = (factors["default"].weight for factors in (module.lora_A, module.lora_B))
    direction = weight + 2 * second @ first
    rows = module.lora_magnitude_vector["default"].weight / direction.norm(dim=1)
    torch.testing.assert_close(module(x), x @ (rows[:, None] * direction).T + layer(base).bias)


def test_pissa_begins_with_the_largest_singular_vectors_and_takes_them_out_of_the_weight(base: LlamaForCausalLM) -> None:
    model = attached("pissa")
    module = layer(model)
    first, second = (factors["default"].weight for factors in (module.lora_A, module.lora_B))
    values = torch.linalg.svdvals(layer(base).weight)
    torch.testing.assert_close(torch.linalg.svdvals(2 * second @ first)[:4], values[:4])
    torch.testing.assert_close(torch.linalg.svdvals(module.base_layer.weight)[:12], values[4:], atol=1e-5, rtol=1e-4)


def test_what_pissa_writes_is_of_twice_the_rank_and_holds_the_difference() -> None:
    model = attached("pissa")
    tensors = written(model, METHODS["pissa"])
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    assert tensors[f"{stem}A.weight"].shape == (8, 16)
    torch.testing.assert_close(tensors[f"{stem}B.weight"] @ tensors[f"{stem}A.weight"], torch.zeros(16, 16))


def test_gaussian_factors_have_a_variance_of_one_over_the_rank() -> None:
    first = torch.cat([each.flatten() for name, each in learning(attached("gaussian")).items() if "lora_A" in name])
    assert first.std().item() == pytest.approx(1 / 4, rel=0.2)


def test_which_biases_learn() -> None:
    every = {name for name, _ in attached("bitfit").named_parameters() if name.endswith("bias")}
    assert len(every) == 7 * BLOCKS
    assert set(learning(attached("bitfit"))) == every
    count = {name: sum("bias" in each for each in learning(attached(name))) for name in ("lora", "its biases", "biases")}
    assert count == {"lora": 0, "its biases": BLOCKS, "biases": 7 * BLOCKS}


def test_only_the_blocks_that_were_named_are_adapted() -> None:
    assert {name.split(".")[2] for name in learning(attached("one block"))} == {"1"}


def test_factors_on_embedding_and_head() -> None:
    shapes = {name.rsplit(".lora_", 1)[1]: tuple(each.shape) for name, each in learning(attached("tables")).items()}
    assert shapes == {
        "embedding_A.default": (4, 50),
        "embedding_B.default": (16, 4),
        "A.default.weight": (2, 16),
        "B.default.weight": (50, 2),
    }


def test_ia3_scales_outputs_and_the_inputs_of_feedforward_layers() -> None:
    model = attached("ia3")
    assert all((parameter == 1).all() for parameter in learning(model).values())
    shapes = {name.split(".")[-3]: tuple(parameter.shape) for name, parameter in learning(model).items()}
    assert shapes == {"k_proj": (16, 1), "down_proj": (1, 32)}


def test_full_fine_tuning_leaves_nothing_frozen() -> None:
    model = attached("full")
    assert len(learning(model)) == len(list(model.parameters()))


def test_loraplus_is_about_b_on_layers_and_tables() -> None:
    assert {name.split(".lora_")[1] for name in second_factors(attached("tables"))} == {
        "embedding_B.default",
        "B.default.weight",
    }


PROMPTS = {
    "prompt tuning": PromptTuning(kind="prompt_tuning", virtual_tokens=3),
    "p-tuning": PTuning(kind="p_tuning", virtual_tokens=3, hidden_size=8),
    "p-tuning by an lstm": PTuning(kind="p_tuning", virtual_tokens=3, hidden_size=8, encoder="lstm"),
    "prefix tuning": PrefixTuning(kind="prefix_tuning", virtual_tokens=3),
    "prefix tuning through a network": PrefixTuning(kind="prefix_tuning", virtual_tokens=3, projection=8),
}


def prompted(name: str) -> SummedLoss:
    model = new_model()
    attach(model, Adaptation(prompt=PROMPTS[name]), seed=1)
    return SummedLoss(model)


@pytest.mark.parametrize("name", PROMPTS)
def test_virtual_tokens_learn_and_the_model_does_not(name: str) -> None:
    loss = prompted(name)
    loss(IDS, IDS).backward()
    for parameter_name, parameter in loss.model.named_parameters():
        assert parameter.requires_grad == parameter_name.startswith("prompts."), parameter_name
        assert (parameter.grad is not None and parameter.grad.any().item()) == parameter.requires_grad, parameter_name


@pytest.mark.parametrize("name", PROMPTS)
def test_each_sample_sees_the_virtual_tokens_and_nothing_of_the_others(name: str) -> None:
    loss = prompted(name).eval()
    with torch.no_grad():
        both, first = loss(IDS, IDS), loss(IDS[:1], IDS[:1])
        second = loss(IDS[1:], IDS[1:])
    torch.testing.assert_close(both, first + second)


@pytest.mark.parametrize("name", PROMPTS)
def test_the_base_alone_is_measured_without_them(base: LlamaForCausalLM, name: str) -> None:
    loss = prompted(name).eval()
    with torch.no_grad():
        told, expected = loss(IDS, IDS), SummedLoss(base)(IDS, IDS)
        with loss.base_alone():
            alone = loss(IDS, IDS)
        again = loss(IDS, IDS)
    assert torch.equal(alone, expected)
    assert torch.equal(told, again)
    assert not torch.allclose(told, alone, atol=1e-3)


def test_a_row_of_several_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="must hold one sample"):
        prompted("prompt tuning")(IDS, IDS, torch.arange(10).expand(2, -1))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora", {"q_proj": (2 * 2 * 4 * 16, 2 * (2 * 4 * 16 + 16 * 16 + 16))}),
        (
            "tables",
            {"embed_tokens": (4 * (50 + 16), 50 * 16 + 4 * (50 + 16)), "lm_head": (2 * (50 + 16), 50 * 16 + 2 * (50 + 16))},
        ),
        ("ia3", {"k_proj": (2 * 16, 2 * (16 * 16 + 16 + 16)), "down_proj": (2 * 32, 2 * (32 * 16 + 16 + 32))}),
    ],
)
def test_what_learns_is_counted_by_kind_of_module(name: str, expected: dict[str, tuple[int, int]]) -> None:
    counts = count_by_kind(attached(name))
    assert {kind: pair for kind, pair in counts.items() if pair[0]} == expected
    assert (sum(trained for trained, _ in counts.values()), sum(total for _, total in counts.values())) == count_parameters(
        attached(name)
    )


def test_virtual_tokens_are_a_kind_of_their_own() -> None:
    assert count_by_kind(prompted("prompt tuning").model)["prompts"] == (3 * 16, 3 * 16)
