"""Floating-point operations that a training step needs, whoever computes it: what utilisation is measured in.

A linear layer of N weights takes 2N operations a token forward, 2N for the gradient of its input, and 2N for that of its
weights, which frozen ones have not: 4N a token through a frozen body, 6N where it is trained. Gradient checkpointing runs
the body forward a second time. The head counts positions with loss only, attention the tokens that a token may see.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from orchestrator.model.loss import SummedLoss


@dataclass(frozen=True)
class StepFlops:
    """What one token and one target cost."""

    body: float
    """Per token: linear layers of the blocks, with their LoRA."""
    attention: float
    """Per token and token that it sees: scores and weighted values."""
    head: float
    """Per position with loss."""

    def of(self, tokens: int, targets: int, seen: float) -> float:
        """Operations for so many tokens, each of which sees `seen` on average."""
        return tokens * (self.body + self.attention * seen) + targets * self.head


def step_flops(loss: SummedLoss, checkpointing: bool) -> StepFlops:
    """Of a model as it is trained; every parameter that is learned has `requires_grad`."""
    model = loss.model
    blocks, head, embedding = model.model.layers, model.lm_head, model.model.embed_tokens
    weights = sum(size for size, _ in _matrices(blocks))
    trained = sum(size for size, learns in _matrices(blocks) if learns)
    goes_back = trained > 0 or any(parameter.requires_grad for parameter in embedding.parameters())
    forwards = 2 if checkpointing and goes_back else 1
    config = model.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return StepFlops(
        body=2.0 * (weights * (forwards + goes_back) + trained),
        attention=4.0 * width * config.num_hidden_layers * (forwards + 2 * goes_back),
        head=2.0 * sum(size * (1 + goes_back + learns) for size, learns in _matrices(head)),
    )


def _matrices(module: nn.Module) -> Iterator[tuple[int, bool]]:
    """The elements of each matrix, and whether it learns."""
    for parameter in module.parameters():
        # Under ZeRO-3 a rank holds a part of it, which is flat; several weights of a few bits share a byte.
        packed = getattr(parameter, "quant_state", None)
        shape = packed.shape if packed else getattr(parameter, "ds_shape", parameter.shape)
        if len(shape) == 2:
            yield shape[0] * shape[1], parameter.requires_grad
