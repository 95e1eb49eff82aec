"""Instructions through a tokenizer's own chat template, with loss on exactly what the assistant says."""

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import jinja2

from orchestrator.data.instructions import Instruction, Message
from orchestrator.data.samples import Sample
from orchestrator.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""From and to, in characters."""


def chat_samples(tokenizer: "PreTrainedTokenizerBase", instructions: Sequence[Instruction]) -> list[Sample]:
    """One sample for each conversation; ModelError where the template hides what the answers are."""
    if tokenizer.chat_template is None:
        raise ModelError("template: chat needs a tokenizer with a chat template, and this one has none; set template=alpaca")
    if not tokenizer.is_fast:
        raise ModelError("template: chat needs a fast tokenizer, which says where its tokens lie; set template=alpaca")
    rendered = [_render_with_spans(tokenizer, instruction) for instruction in instructions]
    # The template has written the special tokens, so here they are read as such. Tokenizing the conversation
    # whole, not in parts, keeps SentencePiece from putting a space before every part.
    encoding = tokenizer(
        [text for text, _ in rendered],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    samples = []
    for place, (text, spans) in enumerate(rendered):
        ids, offsets = encoding["input_ids"][place], encoding["offset_mapping"][place]
        answers = [_answer_tokens(text, span, ids, offsets, special) for span in spans]
        samples.append(_sample(ids, answers))
    return samples


def chat_prompt_ids(tokenizer: "PreTrainedTokenizerBase", conversation: Sequence[dict[str, str]]) -> list[int]:
    """What a model reads that is to say what comes next; ModelError where the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        raise ModelError("template: chat needs a tokenizer with a chat template, and this one has none; set template=alpaca")
    found = tokenizer.apply_chat_template(
        cast(Any, list(conversation)), add_generation_prompt=True, return_dict=False, tokenize=True
    )
    return cast("list[int]", found)


def _render_with_spans(tokenizer: "PreTrainedTokenizerBase", instruction: Instruction) -> tuple[str, list[Span]]:
    """The conversation up to its last answer (what follows one is never learned), and where its answers lie in it."""
    turns = [place for place, message in enumerate(instruction.messages) if message.role == "assistant"]
    try:
        prompts = [_render(tokenizer, instruction.messages[:place], prompt=True) for place in turns]
        answered = [_render(tokenizer, instruction.messages[: place + 1], prompt=False) for place in turns]
    except jinja2.TemplateError as error:
        raise DataError(f"{instruction.where}: the chat template does not take this conversation: {error}") from error
    grows = [part for pair in zip(prompts, answered, strict=True) for part in pair]
    if not all(after.startswith(before) for before, after in itertools.pairwise(grows)):
        raise ModelError(
            f"{instruction.where}: the tokenizer's chat template writes earlier messages differently once a later one "
            "follows, so its answers cannot be told from its prompts; set template=alpaca, or give another chat_template"
        )
    return answered[-1], [(len(before), len(after)) for before, after in zip(prompts, answered, strict=True)]


def _render(tokenizer: "PreTrainedTokenizerBase", messages: Iterable[Message], prompt: bool) -> str:
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt)
    assert isinstance(text, str)
    return text


def _answer_tokens(text: str, span: Span, ids: list[int], offsets: list[Span], special: set[int]) -> range:
    """The tokens of an answer, through the special token that ends it but not the line feed some templates put after."""
    inside = [place for place, (start, stop) in enumerate(offsets) if stop > span[0] and start < span[1]]
    ends = [place for place in inside if ids[place] in special]
    if not ends or text[offsets[ends[-1]][1] : span[1]].strip():
        raise ModelError(
            "template: the tokenizer's chat template ends an answer without a special token, so the model could not learn "
            "to stop; end answers with eos_token in it, or set template=alpaca"
        )
    return range(inside[0], ends[-1] + 1)


def _sample(ids: list[int], answers: Sequence[range]) -> Sample:
    *earlier, last = answers
    prompt_loss = [False] * last.start
    for answer in earlier:
        prompt_loss[answer.start : answer.stop] = [True] * len(answer)
    return Sample(ids[: last.start], prompt_loss, ids[last.start : last.stop])
