"""Attention on a CPU is torch's own, sample by sample."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from orchestrator.model.attention import attend, use_cpu_attention

HEADS, SIZE = 3, 8


def tensors(rows: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key, value, and a gradient for what comes out."""
    generator = torch.Generator().manual_seed(tokens)
    made = [torch.randn(rows, HEADS, tokens, SIZE, generator=generator).to(dtype) for _ in range(4)]
    return [*(tensor.requires_grad_() for tensor in made[:3]), made[3]]


def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def gradients(out: Tensor, inputs: list[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, gradient)


@pytest.mark.parametrize("tokens", [1, 7, 128, 129, 300])
def test_it_is_torchs_own_with_its_gradients(tokens: int) -> None:
    *inputs, gradient = tensors(2, tokens)
    ours, expected = attend(*inputs, scale=SIZE**-0.5), theirs(*inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for mine, its in zip(gradients(ours, inputs, gradient), gradients(expected, inputs, gradient), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


def test_in_bf16_it_is_as_near_to_fp32_as_torchs_own() -> None:
    *inputs, _ = tensors(2, 300, torch.bfloat16)
    exact = theirs(*(tensor.float() for tensor in inputs))
    ours, its = ((found.float() - exact).abs().mean() for found in (attend(*inputs, scale=SIZE**-0.5), theirs(*inputs)))
    assert ours < 1.25 * its


def test_a_sample_of_a_row_of_several_is_as_it_is_alone() -> None:
    *inputs, gradient = tensors(2, 200)
    samples = [(0, 0, 60), (0, 60, 61), (0, 61, 200), (1, 0, 150)]
    spans = [(slice(row, row + 1), slice(first, end)) for row, first, end in samples]
    packed = attend(*inputs, scale=SIZE**-0.5, spans=spans)
    to_packed = gradients(packed, inputs, gradient)
    for rows, tokens in spans:
        alone = [tensor.detach()[rows, :, tokens].requires_grad_() for tensor in inputs]
        expected = theirs(*alone)
        torch.testing.assert_close(packed[rows, :, tokens], expected, rtol=1e-5, atol=1e-5)
        for mine, its in zip(to_packed, gradients(expected, alone, gradient[rows, :, tokens]), strict=True):
            torch.testing.assert_close(mine[rows, :, tokens], its, rtol=1e-4, atol=1e-5)
    assert not packed[1, :, 150:].any(), "no sample, nothing to attend to"
    assert not any(gradient[1, :, 150:].any() for gradient in to_packed)


def model_of(kind: str) -> PreTrainedModel:
    shape = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape))
    return MistralForCausalLM(MistralConfig(**shape, sliding_window=5))


@pytest.mark.parametrize("kind", ["llama", "mistral with a window"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_model_computes_what_it_did(kind: str, padded: bool) -> None:
    model, ids = model_of(kind), torch.arange(36).reshape(3, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    given = {"attention_mask": mask} if padded else {}
    with torch.no_grad():
        before = model(ids, use_cache=False, **given).logits
        use_cpu_attention(model)
        after = model(ids, use_cache=False, **given).logits
    real = mask.bool() if padded else torch.ones_like(ids).bool()
    torch.testing.assert_close(after[real], before[real], rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == "cpu_blocks"
