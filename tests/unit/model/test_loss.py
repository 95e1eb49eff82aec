"""The summed loss is Hugging Face's own, times the targets it averages over."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.model.loss import IGNORED, SummedLoss, held_out_numbers, summed_cross_entropy

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


def cross_entropy(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def given(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(33, 16).to(dtype).requires_grad_()
    return nn.Linear(16, VOCABULARY, bias=False).to(dtype), hidden, torch.randint(VOCABULARY, (33,))


@pytest.mark.parametrize("most_logits", [1 << 20, 7 * VOCABULARY, 1], ids=["at once", "in five pieces", "one by one"])
def test_logits_that_are_computed_again_in_pieces_change_nothing(most_logits: int) -> None:
    head, hidden, targets = given()
    expected = cross_entropy(head, hidden, targets)
    to_hidden, to_weight = torch.autograd.grad(expected * 0.5, [hidden, head.weight])
    ours = summed_cross_entropy(head, hidden, targets, most_logits)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-5)
    (ours * 0.5).backward()
    torch.testing.assert_close(hidden.grad, to_hidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.weight.grad, to_weight, rtol=1e-5, atol=1e-6)


def test_in_bf16_its_gradient_is_to_the_bit_what_plain_cross_entropy_gives() -> None:
    head, hidden, targets = given(torch.bfloat16)
    expected = torch.autograd.grad(cross_entropy(head, hidden, targets) * 0.25, [hidden, head.weight])
    ours = torch.autograd.grad(summed_cross_entropy(head, hidden, targets) * 0.25, [hidden, head.weight])
    assert [torch.equal(mine, its) for mine, its in zip(ours, expected, strict=True)] == [True, True]


def test_a_head_with_lora_learns_through_it(model, ids) -> None:
    """Fused losses that read the head's weight would leave its LoRA out."""
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    expected = adapted(input_ids=ids, labels=ids).loss * 33
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trained) == 2
    to_lora = torch.autograd.grad(expected, trained)
    ours = SummedLoss(adapted.base_model.model)(ids, ids)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    for mine, its in zip(torch.autograd.grad(ours, trained), to_lora, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
        assert mine.any()


def test_its_gradient_is_there_once() -> None:
    head, hidden, targets = given()
    loss = summed_cross_entropy(head, hidden, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gives its gradient once"):
        loss.backward()


class _LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that anything makes meanwhile."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize(("loss", "of_the_logits"), [(summed_cross_entropy, 1), (cross_entropy, 2)])
def test_no_fp32_copy_of_all_logits_is_made(loss, of_the_logits: int) -> None:
    vocabulary, rows = 60_000, 64
    head = nn.Linear(4, vocabulary, bias=False, dtype=torch.bfloat16)
    hidden, targets = torch.randn(rows, 4, dtype=torch.bfloat16), torch.arange(rows)
    with _LargestTensor() as seen:
        loss(head, hidden, targets).backward()
    assert seen.largest == of_the_logits * rows * vocabulary * 2


def test_bits_per_character_are_nats_in_bits_over_characters():
    found = held_out_numbers(3 * math.log(2), targets=6, characters=2, text_bytes=4)
    assert found["bits_per_character"] == pytest.approx(1.5)
    assert found["bits_per_byte"] == pytest.approx(0.75)
    assert found["loss"] == pytest.approx(0.5 * math.log(2))
    assert found["perplexity"] == pytest.approx(2**0.5)
