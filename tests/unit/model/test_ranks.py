"""Singular values of B A, without ever making it."""

import pytest
import torch

from orchestrator.model.adapters import LayerRank, layer_ranks, merge_rule, peft_config
from orchestrator.plan.adaptation import Adaptation
from orchestrator.plan.targets import LoraShape

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def test_singular_values_are_those_of_the_scaled_product() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(4, 20), torch.randn(30, 4)
    rule = merge_rule(peft_config(Adaptation(lora={"q_proj": LoraShape(4, 8)}, trained_lora=("q_proj",))))
    tensors = {f"{LAYER}.lora_A.weight": first, f"{LAYER}.lora_B.weight": second, "base_model.model.lm_head.weight": first}
    (found,) = layer_ranks(tensors, rule)
    assert (found.layer, found.rank) == ("model.layers.0.self_attn.q_proj", 4)
    expected = torch.linalg.svdvals(2 * second @ first)[:4]
    torch.testing.assert_close(torch.tensor(found.singular_values), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "effective"), [((1.0, 1.0, 1.0, 1.0), 4), ((3.0, 0.0, 0.0), 1), ((1.0, 1.0, 0.0, 0.0), 2), ((2.0, 1.0), 1.89)]
)
def test_the_effective_rank_counts_equal_values_and_no_zeros(values: tuple[float, ...], effective: float) -> None:
    assert LayerRank("layer", values).effective_rank == pytest.approx(effective, abs=0.005)
