"""The operations of a step are those that torch counts, where it can, and what is known of the benchmark's model."""

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.model.adapters import attach
from orchestrator.model.flops import step_flops
from orchestrator.model.loss import SummedLoss
from orchestrator.plan.adaptation import Adaptation
from orchestrator.plan.targets import LoraShape

ROWS, TOKENS = 2, 20
BOTH = ("embed_tokens", "lm_head")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def adaptation(lora: tuple[str, ...], modules: tuple[str, ...]) -> Adaptation:
    return Adaptation({name: LoraShape(4, 8) for name in lora}, modules, lora, modules)


def model(**shape: Any) -> SummedLoss:
    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return SummedLoss(LlamaForCausalLM(LlamaConfig(**{**settings, **shape})))


def counted(loss: SummedLoss) -> int:
    """What torch counts of one forward and backward; of attention on a CPU it counts nothing."""
    ids = torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS)
    with FlopCounterMode(display=False) as counter:
        loss(ids, ids).backward()
    return sum(
        count for operation, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(operation)
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("lora", "modules"),
    [((), ("embed_tokens",)), (ATTENTION, ("embed_tokens", "lm_head")), (("gate_proj", "down_proj"), ("embed_tokens",))],
)
def test_linear_layers_take_what_torch_counts(lora: tuple[str, ...], modules: tuple[str, ...], checkpointing: bool) -> None:
    loss = model()
    attach(loss.model, adaptation(lora, modules), seed=1)
    if checkpointing:
        loss.train()
        loss.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = step_flops(loss, checkpointing).of(ROWS * TOKENS, ROWS * (TOKENS - 1), seen=0)
    # Else the second forward of a block would end once all is there that was forgotten, before its last product.
    with set_checkpoint_early_stop(False):
        assert found == counted(loss)


def test_a_model_that_learns_in_its_head_alone_goes_back_no_further() -> None:
    loss = model()
    attach(loss.model, adaptation((), ("lm_head",)), seed=1)
    flops = step_flops(loss, checkpointing=False)
    assert flops.of(ROWS * TOKENS, ROWS * (TOKENS - 1), seen=0) == counted(loss)


def test_attention_counts_scores_and_values_once_forward_and_twice_back() -> None:
    loss = model()
    flops = step_flops(loss, checkpointing=False)
    assert flops.attention == 3 * (2 + 2) * 32 * 3
    assert step_flops(loss, checkpointing=True).attention == pytest.approx(flops.attention * 4 / 3)


def test_the_benchmarks_attention_stage_takes_256_million_a_token() -> None:
    """Known of it: 25.3 million weights in the blocks, 25.6 million in the head."""
    shape = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8}
    loss = model(vocab_size=49_953, num_attention_heads=8, num_key_value_heads=8, **shape)
    attach(loss.model, Adaptation({name: LoraShape(8, 32) for name in ATTENTION}, BOTH, ATTENTION, BOTH), seed=1)
    assert step_flops(loss, checkpointing=False).of(1, 1, seen=0) == pytest.approx(256e6, rel=5e-3)
