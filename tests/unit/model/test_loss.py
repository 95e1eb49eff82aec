"""The summed loss is Hugging Face's own, times the targets it averages over."""

import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.model.loss import IGNORED, SummedLoss, bits_per_character

VOCABULARY = 50


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))


def answers_only(ids: Tensor) -> Tensor:
    """Labels of rows whose prompts are 4, 7 and 9 tokens long."""
    labels = ids.clone()
    for row, prompt in enumerate((4, 7, 9)):
        labels[row, :prompt] = IGNORED
    return labels


@pytest.mark.parametrize(("labels_of", "targets"), [(torch.clone, 33), (answers_only, 8 + 5 + 3)])
def test_it_is_the_mean_of_hugging_face_times_the_targets(model, ids, labels_of, targets):
    labels = labels_of(ids)
    theirs = model(input_ids=ids, labels=labels).loss
    ours = SummedLoss(model)(ids, labels)
    assert ours.item() == pytest.approx(theirs.item() * targets, rel=1e-6)


def test_its_gradient_is_theirs_too(model, ids):
    labels = answers_only(ids)
    (model(input_ids=ids, labels=labels).loss * 16).backward()
    theirs = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    SummedLoss(model)(ids, labels).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-4, atol=1e-5)


def test_a_prompt_carries_no_loss(model, ids):
    labels = torch.full_like(ids, IGNORED)
    labels[:, -1] = ids[:, -1]
    log_probabilities = model(input_ids=ids).logits[:, -2].log_softmax(dim=-1)
    expected = -log_probabilities.gather(1, ids[:, -1:]).sum()
    assert SummedLoss(model)(ids, labels).item() == pytest.approx(expected.item(), rel=1e-6)


def test_nothing_predicts_the_first_token(model, ids):
    labels = torch.full_like(ids, IGNORED)
    labels[:, 0] = ids[:, 0]
    assert SummedLoss(model)(ids, labels).item() == 0


def test_a_micro_batch_without_targets_is_zero_and_has_gradients_of_zero(model, ids):
    loss = SummedLoss(model)(ids, torch.full_like(ids, IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_the_sum_is_fp32_for_a_model_in_bf16(model, ids):
    assert SummedLoss(model.bfloat16())(ids, ids).dtype == torch.float32


def test_bits_per_character_are_nats_in_bits_over_characters():
    assert bits_per_character(3 * math.log(2), 2) == pytest.approx(1.5)
