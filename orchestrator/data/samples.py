"""An instruction in tokens, and how one that is too long is made to fit a row."""

from dataclasses import dataclass

import numpy as np

from orchestrator.data.storage import Row


@dataclass(frozen=True)
class Sample:
    """An instruction in tokens, of any length: what comes before its last answer, and that answer."""

    prompt: list[int]
    prompt_loss: list[bool]
    """True on the earlier answers of a conversation."""
    answer: list[int]
    """The last answer with the token that ends it; all of it carries loss."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def fit(sample: Sample, block_length: int, begin: list[int]) -> Row:
    """The sample as one row of at most `block_length` tokens that ends with the answer's end token.

    A sample that is too long loses the front of its prompt, though not the begin-of-text token, until a quarter of the
    block is left to the prompt; then the answer loses its tail, though not its end token.
    """
    room = max(block_length - len(sample.answer), block_length // 4)
    prompt, loss = sample.prompt, sample.prompt_loss
    if len(sample) > block_length and len(prompt) > room:
        kept = begin if prompt[: len(begin)] == begin else []
        front = len(prompt) - (room - len(kept))
        prompt, loss = kept + prompt[front:], [False] * len(kept) + loss[front:]
    answer = sample.answer
    if len(prompt) + len(answer) > block_length:
        answer = [*answer[: block_length - len(prompt) - 1], answer[-1]]
    return Row(np.array(prompt + answer, np.int32), np.array(loss + [True] * len(answer), np.bool_))
