"""No leak: a sample that shares its row learns and is learned as if it were alone."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from orchestrator.data.batches import MicroBatch, micro_batch
from orchestrator.data.packing import packed
from orchestrator.data.storage import Row
from orchestrator.model.attention import use_cpu_attention
from orchestrator.model.loss import SummedLoss

BLOCK = 48
_SHAPE = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE)),
    "mistral, window": lambda: MistralForCausalLM(MistralConfig(**_SHAPE, sliding_window=7)),
}


@pytest.fixture(params=["blocks", "torch"])
def attention(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest, attention: str) -> SummedLoss:
    torch.manual_seed(0)
    made = MODELS[request.param]()
    # Larger than they begin, so that what a token attends to matters.
    for parameter in made.parameters():
        parameter.data.mul_(8 if parameter.dim() > 1 else 1)
    if attention == "blocks":
        use_cpu_attention(made)
    return SummedLoss(made)


@pytest.fixture
def samples() -> list[Row]:
    generator = np.random.default_rng(3)
    lengths = (5, 17, 23, 30, 11, 8, 40)
    return [Row(generator.integers(1, 60, n).astype(np.int32), np.arange(n) >= n // 3) for n in lengths]


def loss_of(model: SummedLoss, batch: MicroBatch) -> float:
    return model(*batch.on(torch.device("cpu"))).item()


def test_the_loss_of_packed_samples_is_the_sum_of_each_alone(model: SummedLoss, samples: list[Row]) -> None:
    alone = sum(loss_of(model, micro_batch([sample])) for sample in samples)
    rows = packed(samples, BLOCK)
    assert len(rows) == 3
    assert loss_of(model, micro_batch(rows)) == pytest.approx(alone, rel=1e-5)


def test_gradients_are_the_same_too(model: SummedLoss, samples: list[Row]) -> None:
    trained = list(model.parameters())
    alone = torch.stack([model(*micro_batch([sample]).on(torch.device("cpu"))) for sample in samples]).sum()
    expected = torch.autograd.grad(alone, trained)
    found = torch.autograd.grad(model(*micro_batch(packed(samples, BLOCK)).on(torch.device("cpu"))), trained)
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4 * its.abs().max().item())


def test_what_the_others_of_a_row_say_changes_nothing(model: SummedLoss, samples: list[Row]) -> None:
    """Hidden states of the second sample, with another first one."""
    batch, other = (
        micro_batch(packed([Row(tokens, samples[2].loss_mask), samples[1]], BLOCK))
        for tokens in (samples[2].tokens, samples[2].tokens[::-1].copy())
    )
    seen = []
    for each in (batch, other):
        ids, _, positions = each.on(torch.device("cpu"))
        assert positions is not None
        labels = torch.full_like(ids, -100)
        labels[:, 24:40] = ids[:, 24:40]
        seen.append(model(ids, labels, positions).item())
    assert seen[0] == pytest.approx(seen[1], abs=1e-5)
    without_positions = [model(each.input_ids, each.labels).item() for each in (batch, other)]
    assert abs(without_positions[0] - without_positions[1]) > 1e-2, "the test would see a leak"


def test_activations_that_are_computed_again_are_the_same(model: SummedLoss, samples: list[Row]) -> None:
    """Gradient checkpointing calls each block twice, and must tell it both times where samples begin."""
    batch, trained = micro_batch(packed(samples, BLOCK)).on(torch.device("cpu")), list(model.parameters())
    model.train()
    expected = torch.autograd.grad(model(*batch), trained)
    model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for mine, its in zip(torch.autograd.grad(model(*batch), trained), expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6 * its.abs().max().item())
