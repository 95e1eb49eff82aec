"""It really trained: each declared tensor got a gradient and moved, each frozen one is bit for bit what it was."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from orchestrator.data.batches import MicroBatch
from orchestrator.engine import StepResult
from orchestrator.errors import TrainingError
from orchestrator.model.loss import IGNORED, SummedLoss
from orchestrator.train.loop import INSPECTED_STEPS, Progress

_PREFLIGHT_TOKENS = 64


@dataclass(frozen=True)
class LearningState:
    """What a check that is not over yet must know after a restart."""

    updates: int
    masters_before: dict[str, int]


class LearningCheck:
    """A hook: after the first steps, and whenever asked, compares with what the tensors were before training.

    A factor of LoRA has no gradient while the other is zero, so what did not move in the first step must have moved in the
    second.
    """

    def __init__(
        self,
        masters: Callable[[], dict[str, int]],
        frozen: Callable[[], dict[str, int]],
        earlier: LearningState | None = None,
    ) -> None:
        self._masters, self._frozen = masters, frozen
        self._masters_before, self._frozen_before = earlier.masters_before if earlier else masters(), frozen()
        self._updates = earlier.updates if earlier else 0

    def state(self) -> LearningState:
        """For a checkpoint; once the check is over it needs no checksums."""
        return LearningState(self._updates, self._masters_before if self._updates < INSPECTED_STEPS else {})

    def after_step(self, progress: Progress, result: StepResult) -> None:
        # Updates are counted, not steps: fp16 skips its first few steps until the loss scale fits, and nothing moves.
        if result.skipped or self._updates == INSPECTED_STEPS:
            return
        self._updates += 1
        is_first = self._updates < INSPECTED_STEPS
        _check_gradients(result.gradient_norms, may_be_zero=is_first)
        self.check_frozen()
        self._check_moved(may_wait=is_first)

    def check_frozen(self) -> None:
        """All ranks must call; TrainingError names a frozen tensor that changed."""
        now = self._frozen()
        for name, before in self._frozen_before.items():
            if now[name] != before:
                raise TrainingError(f"{name} is declared frozen, but training changed it")

    def _check_moved(self, may_wait: bool) -> None:
        now = self._masters()
        for name, before in self._masters_before.items():
            if now[name] == before and not (may_wait and _waits(name)):
                raise TrainingError(f"{name} is declared trainable, but the optimizer did not move it")


def preflight(model: SummedLoss, batch: MicroBatch) -> None:
    """Before any optimizer exists: a few tokens forward and backward, twice, must reach every trainable tensor.

    The second time with B of LoRA away from zero, so that A shows its gradient; all is put back.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    zeroed = {name: parameter for name, parameter in trainable.items() if not parameter.any()}
    # The last target of a row is where its answer ends; what follows is padding.
    end = int((batch.labels[0] != IGNORED).nonzero()[-1]) + 1
    ids, labels = (part[:1, max(0, end - _PREFLIGHT_TOKENS) : end] for part in (batch.input_ids, batch.labels))
    _check_gradients(_gradients(model, trainable, ids, labels), may_be_zero=True)
    with torch.no_grad():
        for parameter in zeroed.values():
            parameter.fill_(1e-3)
    try:
        _check_gradients(_gradients(model, trainable, ids, labels), may_be_zero=False)
    finally:
        with torch.no_grad():
            for parameter in zeroed.values():
                parameter.zero_()


def _waits(name: str) -> bool:
    """Whether a parameter may have no gradient at first: each of these meets a zero."""
    return any(part in name for part in ("lora_A", "lora_embedding_B", "adapter_down", "subspace.scales"))


def check_end_is_learned(batches: Iterable[MicroBatch], end_id: int) -> None:
    """TrainingError unless the end of sequence is among the labels; a model that never sees it never stops."""
    for batch in batches:
        if (batch.labels[:, 1:] == end_id).any():
            return
    raise TrainingError(
        f"no sample carries loss on the end of sequence (token {end_id}); the model would never learn to stop"
    )


def _gradients(
    model: SummedLoss, trainable: dict[str, torch.nn.Parameter], ids: torch.Tensor, labels: torch.Tensor
) -> dict[str, float]:
    model.zero_grad(set_to_none=True)
    loss = model(ids, labels)
    if not loss.isfinite():
        raise TrainingError(f"the loss of the first sample is {loss.item()}")
    (loss / max(1, int((labels[:, 1:] != IGNORED).sum()))).backward()
    missing = [name for name, parameter in trainable.items() if parameter.grad is None]
    if missing:
        raise TrainingError(f"{missing[0]} is declared trainable but got no gradient; is it used in the forward?")
    norms = {
        name: parameter.grad.float().norm().item() for name, parameter in trainable.items() if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return norms


def _check_gradients(norms: dict[str, float], may_be_zero: bool) -> None:
    for name, norm in norms.items():
        if not torch.isfinite(torch.tensor(norm)):
            raise TrainingError(f"{name} has a gradient that is not finite ({norm})")
        if norm == 0 and not (may_be_zero and _waits(name)):
            raise TrainingError(f"{name} is declared trainable, but its gradient is zero")
