"""The checks that a stage really learns: planted faults are caught by name, a healthy stage passes."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.data.batches import MicroBatch
from orchestrator.engine import StepResult
from orchestrator.errors import TrainingError
from orchestrator.model.adapters import attach
from orchestrator.model.checksum import checksum
from orchestrator.model.loss import IGNORED, SummedLoss
from orchestrator.plan.adaptation import Adaptation
from orchestrator.plan.targets import LoraShape
from orchestrator.train.checks import LearningCheck, LearningState, check_end_is_learned, preflight
from orchestrator.train.loop import Progress

END = 2
ADAPTATION = Adaptation(
    lora={"q_proj": LoraShape(4, 8), "v_proj": LoraShape(4, 8), "up_proj": LoraShape(2, 4)},
    modules_to_save=("embed_tokens", "lm_head"),
    trained_lora=("v_proj", "up_proj"),
    trained_modules=("embed_tokens", "lm_head"),
    dropout=0.05,
)
FACTOR_A = "model.model.layers.1.self_attn.v_proj.lora_A.default.weight"
FACTOR_B = "model.model.layers.1.self_attn.v_proj.lora_B.default.weight"
FROZEN = "model.model.layers.0.mlp.down_proj.weight"
IDS = torch.randint(3, 50, (4, 80), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> SummedLoss:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )
    attach(llama, ADAPTATION, seed=1)
    return SummedLoss(llama.train())


@pytest.fixture
def batch() -> MicroBatch:
    return MicroBatch(IDS, IDS.clone())


def of(model: nn.Module, name: str) -> nn.Parameter:
    return dict(model.named_parameters())[name]


def checksums(model: nn.Module, trainable: bool) -> dict[str, int]:
    chosen = ((name, each) for name, each in model.named_parameters() if each.requires_grad == trainable)
    return {name: checksum(each) for name, each in chosen}


class Training:
    """Steps of plain torch, told to a LearningCheck as the loop tells them."""

    def __init__(self, model: SummedLoss, learning_rates: dict[str, float] | None = None) -> None:
        trainable = {name: each for name, each in model.named_parameters() if each.requires_grad}
        groups = [{"params": [each], "lr": (learning_rates or {}).get(name, 1e-3)} for name, each in trainable.items()]
        self.model, self.trainable = model, trainable
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.check = LearningCheck(partial(checksums, model, True), partial(checksums, model, False))
        self.progress = Progress()

    def restart(self) -> None:
        """Goes on with a new check, which knows of the one before what a checkpoint keeps."""
        earlier = LearningState(**json.loads(json.dumps(asdict(self.check.state()))))
        self.check = LearningCheck(partial(checksums, self.model, True), partial(checksums, self.model, False), earlier)

    def set_learning_rate(self, name: str, rate: float) -> None:
        self.optimizer.param_groups[list(self.trainable).index(name)]["lr"] = rate

    def step(self, meddle: Callable[[], object] = lambda: None, skipped: bool = False) -> None:
        """One update; `meddle` plants a fault after the backward."""
        loss = self.model(IDS, IDS) / IDS.numel()
        loss.backward()
        meddle()
        norms = {name: gradient_norm(each) for name, each in self.trainable.items()}
        if not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress = self.progress.after(IDS.numel())
        self.check.after_step(self.progress, StepResult(loss.item(), 1.0, 1e-3, 1, 1, skipped, gradient_norms=norms))


def gradient_of(model: nn.Module, name: str) -> Tensor:
    gradient = of(model, name).grad
    assert gradient is not None
    return gradient


def gradient_norm(parameter: nn.Parameter) -> float:
    return 0.0 if parameter.grad is None else parameter.grad.norm().item()


def flip_a_bit(tensor: Tensor) -> None:
    tensor.data.view(torch.int32).view(-1)[-1] ^= 1


def test_a_healthy_stage_passes(model):
    training = Training(model)
    assert gradient_norm_of_factor_a_is_zero(model)
    for _ in range(4):
        training.step()
    training.check.check_frozen()


def gradient_norm_of_factor_a_is_zero(model: SummedLoss) -> bool:
    """While B is zero; the reason why the first step is judged more mildly."""
    model(IDS, IDS).backward()
    is_zero = gradient_norm(of(model, FACTOR_A)) == 0
    model.zero_grad()
    return is_zero


@pytest.mark.parametrize("name", [FACTOR_B, "model.lm_head.weight"])
def test_a_gradient_of_zero_is_caught_in_the_first_step(model, name):
    training = Training(model)
    with pytest.raises(TrainingError, match=f"{name} is declared trainable, but its gradient is zero"):
        training.step(lambda: gradient_of(model, name).zero_())


def test_a_gradient_of_zero_in_a_is_caught_in_the_second_step(model):
    training = Training(model)
    training.step()
    with pytest.raises(TrainingError, match=f"{FACTOR_A} is declared trainable, but its gradient is zero"):
        training.step(lambda: gradient_of(model, FACTOR_A).zero_())


def test_a_gradient_that_is_not_finite_is_caught(model):
    training = Training(model)
    with pytest.raises(TrainingError, match=f"{FACTOR_B} has a gradient that is not finite"):
        training.step(lambda: gradient_of(model, FACTOR_B).fill_(float("nan")))


def test_a_frozen_tensor_changed_by_one_bit_is_caught_at_once(model):
    training = Training(model)
    with pytest.raises(TrainingError, match=f"{FROZEN} is declared frozen, but training changed it"):
        training.step(lambda: flip_a_bit(of(model, FROZEN)))


def test_a_frozen_tensor_changed_late_is_caught_at_the_end(model):
    training = Training(model)
    for _ in range(3):
        training.step()
    flip_a_bit(of(model, FROZEN))
    training.step()
    with pytest.raises(TrainingError, match=f"{FROZEN} is declared frozen, but training changed it"):
        training.check.check_frozen()


def test_an_earlier_stages_frozen_factors_are_watched_too(model):
    frozen = FACTOR_A.replace("v_proj", "q_proj")
    training = Training(model)
    with pytest.raises(TrainingError, match=f"{frozen} is declared frozen, but training changed it"):
        training.step(lambda: flip_a_bit(of(model, frozen)))


def test_a_trainable_that_the_optimizer_does_not_move_is_caught(model):
    training = Training(model, learning_rates={"model.model.embed_tokens.weight": 0.0})
    with pytest.raises(TrainingError, match=r"embed_tokens.weight is declared trainable, but the optimizer did not move it"):
        training.step()


def test_an_a_that_the_optimizer_does_not_move_is_caught_in_the_second_step(model):
    training = Training(model, learning_rates={FACTOR_A: 0.0})
    training.step()
    with pytest.raises(TrainingError, match=f"{FACTOR_A} is declared trainable, but the optimizer did not move it"):
        training.step()


def test_steps_that_fp16_skips_do_not_count(model):
    training = Training(model)
    for _ in range(3):
        training.step(skipped=True)
    # B is still zero, and A without a gradient.
    training.step()
    with pytest.raises(TrainingError, match=f"{FACTOR_A} is declared trainable, but its gradient is zero"):
        training.step(lambda: gradient_of(model, FACTOR_A).zero_())


def test_a_healthy_stage_passes_through_restarts(model):
    training = Training(model)
    for _ in range(4):
        training.restart()
        training.step()
    training.check.check_frozen()


def test_after_a_restart_the_second_update_is_judged_as_the_second(model):
    training = Training(model)
    training.step()
    training.restart()
    with pytest.raises(TrainingError, match=f"{FACTOR_A} is declared trainable, but its gradient is zero"):
        training.step(lambda: gradient_of(model, FACTOR_A).zero_())


def test_after_a_restart_what_did_not_move_since_the_beginning_is_caught(model):
    training = Training(model, learning_rates={FACTOR_A: 0.0})
    training.step()
    training.restart()
    with pytest.raises(TrainingError, match=f"{FACTOR_A} is declared trainable, but the optimizer did not move it"):
        training.step()


def test_after_a_restart_what_moved_before_it_need_not_move_again(model):
    training = Training(model)
    training.step()
    training.restart()
    training.set_learning_rate("model.model.embed_tokens.weight", 0.0)
    training.step()


def test_after_a_restart_the_frozen_are_still_watched(model):
    training = Training(model)
    training.step()
    training.restart()
    with pytest.raises(TrainingError, match=f"{FROZEN} is declared frozen, but training changed it"):
        training.step(lambda: flip_a_bit(of(model, FROZEN)))


def test_a_check_that_is_over_stays_over_and_keeps_no_checksums(model):
    training = Training(model)
    assert len(training.check.state().masters_before) == len(training.trainable)
    training.step()
    assert len(training.check.state().masters_before) == len(training.trainable)
    training.step()
    assert training.check.state() == LearningState(2, {})
    training.restart()
    training.step(lambda: gradient_of(model, FACTOR_B).zero_())
    assert training.check.state() == LearningState(2, {})


def test_preflight_passes_a_healthy_model_and_leaves_it_as_it_was(model, batch):
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    preflight(model, batch)
    for name, each in model.named_parameters():
        assert torch.equal(each, before[name])
        assert each.grad is None


def test_preflight_passes_the_first_stage_of_embeddings_alone(batch):
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    attach(llama, Adaptation(modules_to_save=("embed_tokens",), trained_modules=("embed_tokens",)), seed=1)
    preflight(SummedLoss(llama), batch)


def test_preflight_looks_at_the_answer_of_a_short_row_beside_a_long_one(model):
    labels = torch.full_like(IDS, IGNORED)
    labels[0, 4:7] = IDS[0, 4:7]
    labels[1:] = IDS[1:]
    preflight(model, MicroBatch(IDS, labels))


def test_preflight_catches_a_module_that_the_forward_does_not_use(model, batch):
    model.spare = nn.Linear(2, 2, bias=False)
    with pytest.raises(TrainingError, match=r"spare.weight is declared trainable but got no gradient; is it used"):
        preflight(model, batch)


@pytest.mark.parametrize("name", [FACTOR_A, FACTOR_B, "model.lm_head.weight"])
def test_preflight_catches_a_gradient_that_is_cut_off(model, batch, name):
    of(model, name).register_hook(torch.zeros_like)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    with pytest.raises(TrainingError, match=f"{name} is declared trainable, but its gradient is zero"):
        preflight(model, batch)
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())


def test_preflight_catches_a_loss_that_is_not_finite(model, batch):
    of(model, FROZEN).data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="the loss of the first sample is nan"):
        preflight(model, batch)


def test_an_end_of_sequence_that_no_label_holds_is_caught(batch):
    with pytest.raises(TrainingError, match=r"no sample carries loss on the end of sequence \(token 2\)"):
        check_end_is_learned([batch, batch], END)


def test_an_end_of_sequence_that_carries_no_loss_is_caught(batch):
    ids, labels = batch.input_ids.clone(), batch.labels.clone()
    ids[:, -1], labels[:, -1] = END, IGNORED
    # Nothing predicts a row's first token.
    ids[:, 0] = labels[:, 0] = END
    with pytest.raises(TrainingError, match="no sample carries loss on the end of sequence"):
        check_end_is_learned([MicroBatch(ids, labels)], END)


def test_one_end_of_sequence_with_loss_is_enough(batch):
    ids = batch.input_ids.clone()
    ids[3, 40] = END
    check_end_is_learned([batch, MicroBatch(ids, ids)], END)
