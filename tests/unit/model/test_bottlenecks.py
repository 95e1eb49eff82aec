"""Bottleneck adapters: where they stand, what they compute, and that they change nothing at first."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.model.adapters import attach, count_by_kind, count_parameters
from orchestrator.plan.adaptation import Adaptation
from orchestrator.schema import Bottleneck

BLOCKS, HIDDEN, SIZE = 2, 16, 4
IDS = torch.arange(24).reshape(2, 12) * 7 % 50


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": HIDDEN, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=BLOCKS, **shape)).float()


def attached(placement: str) -> Any:
    model = new_model()
    method = Bottleneck.model_validate({"kind": "bottleneck", "placement": placement, "size": SIZE})
    attach(model, Adaptation(bottleneck=method), seed=1)
    return model


@pytest.mark.parametrize(("placement", "each"), [("houlsby", 2), ("pfeiffer", 1)])
def test_where_they_stand_and_what_learns(placement: str, each: int) -> None:
    model = attached(placement)
    assert torch.equal(model(input_ids=IDS).logits, new_model()(input_ids=IDS).logits)
    one = 2 * HIDDEN * SIZE + HIDDEN + SIZE
    assert count_parameters(model)[0] == BLOCKS * each * one
    kinds = {"attention_adapters": BLOCKS * one, "output_adapters": BLOCKS * one}
    if placement == "pfeiffer":
        del kinds["attention_adapters"]
    assert {kind: learns for kind, (learns, _) in count_by_kind(model).items() if learns} == kinds


def test_each_adds_a_network_of_what_its_part_gives() -> None:
    model, plain = attached("houlsby"), new_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters" in name:
                parameter.normal_()
    x = torch.randn(3, 5, HIDDEN)
    for number, block in enumerate(model.model.layers):
        given, network = plain.model.layers[number].mlp(x), block.output_adapters.adapters["bottleneck"]
        down, up = network.adapter_down[0], network.adapter_up
        expected = given + torch.relu(given @ down.weight.T + down.bias) @ up.weight.T + up.bias
        torch.testing.assert_close(block.mlp(x), expected)
    with torch.no_grad():
        difference = model(input_ids=IDS).logits - plain(input_ids=IDS).logits
    assert difference.abs().max() > 0.1
