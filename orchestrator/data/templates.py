"""How an instruction is put to the model: the tokens it reads, and those it learns to say."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from orchestrator.data.chat import chat_prompt_ids, chat_samples
from orchestrator.data.instructions import Instruction
from orchestrator.data.samples import Sample
from orchestrator.data.tokenizer import begin_ids, text_ids
from orchestrator.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["alpaca", "chat"]
Manner = Literal["alpaca", "chat", "plain"]
"""How what a person says is put to a model; plain is text that it goes on with."""

ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response: "
)
"""Stanford Alpaca's prompt as Chinese-LLaMA-Alpaca trains on it (scripts/training/build_dataset.py)."""


def tokenize_instructions(
    tokenizer: "PreTrainedTokenizerBase", template: Template, instructions: Sequence[Instruction]
) -> list[Sample]:
    """One sample for each instruction; raises DataError or ModelError where the template cannot hold it."""
    if template == "alpaca":
        return _alpaca_samples(tokenizer, instructions)
    return chat_samples(tokenizer, instructions)


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", manner: Manner, said: str) -> list[int]:
    """What a model reads that is to answer, or to go on with, what is said."""
    if manner == "chat":
        return chat_prompt_ids(tokenizer, [{"role": "user", "content": said}])
    text = ALPACA_PROMPT.format(instruction=said) if manner == "alpaca" else said
    return begin_ids(tokenizer) + text_ids(tokenizer, [text])[0]


def _alpaca_samples(tokenizer: "PreTrainedTokenizerBase", instructions: Sequence[Instruction]) -> list[Sample]:
    """Prompt and answer are tokenized apart, as published and as inference meets them."""
    turns = [_single_turn(instruction) for instruction in instructions]
    prompts = text_ids(tokenizer, [ALPACA_PROMPT.format(instruction=prompt) for prompt, _ in turns])
    answers = text_ids(tokenizer, [answer for _, answer in turns])
    samples = []
    for prompt, answer in zip(prompts, answers, strict=True):
        prompt = begin_ids(tokenizer) + prompt
        samples.append(Sample(prompt, [False] * len(prompt), [*answer, tokenizer.eos_token_id]))
    return samples


def _single_turn(instruction: Instruction) -> tuple[str, str]:
    roles = [message.role for message in instruction.messages]
    if roles != ["user", "assistant"]:
        raise DataError(
            f"{instruction.where}: template alpaca holds one instruction and its answer, and this is "
            f"{', '.join(roles)}; set template=chat"
        )
    return instruction.messages[0].content, instruction.messages[1].content
