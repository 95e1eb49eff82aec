"""What the model reads of an instruction, what it learns to say, and what is left of one that is too long."""

import pytest

from orchestrator.data.instructions import Instruction, Message
from orchestrator.data.samples import Sample, fit
from orchestrator.data.templates import tokenize_instructions
from orchestrator.errors import DataError, ModelError

CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>\n{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
TWO_TURNS = (("user", "Hi"), ("assistant", "Hello 鲁"), ("user", "And <s> you?"), ("assistant", "Fine."), ("user", "Bye"))


def conversation(*turns) -> Instruction:
    return Instruction(tuple(Message(role, content) for role, content in turns), "instructions: a.json: record 1")


def learned(tokenizer, sample: Sample) -> list[str]:
    """The stretches of text that carry loss."""
    tokens, loss = sample.prompt + sample.answer, [*sample.prompt_loss, *([True] * len(sample.answer))]
    stretches: list[list[int]] = []
    for place, token in enumerate(tokens):
        if loss[place] and (not place or not loss[place - 1]):
            stretches.append([])
        if loss[place]:
            stretches[-1].append(token)
    return [tokenizer.decode(stretch) for stretch in stretches]


def test_alpaca_is_the_published_prompt_and_only_the_answer_is_learned(tokenizer):
    (sample,) = tokenize_instructions(tokenizer, "alpaca", [conversation(("user", "Add {1}.\n2"), ("assistant", "Three"))])
    assert sample.prompt[0] == tokenizer.bos_token_id
    assert sample.answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(sample.prompt[1:]) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {1}.\n2\n\n### Response: "
    )
    assert tokenizer.decode(sample.answer[:-1]) == "Three"
    assert sample.prompt_loss == [False] * len(sample.prompt)


def test_special_tokens_spelled_out_in_a_text_stay_text(tokenizer):
    (sample,) = tokenize_instructions(tokenizer, "alpaca", [conversation(("user", "Strike."), ("assistant", "<s>a</s>"))])
    assert sample.answer.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(sample.answer[:-1]) == "<s>a</s>"


def test_alpaca_refuses_what_it_would_have_to_drop(tokenizer):
    with pytest.raises(DataError) as caught:
        tokenize_instructions(tokenizer, "alpaca", [conversation(*TWO_TURNS)])
    assert str(caught.value) == (
        "instructions: a.json: record 1: template alpaca holds one instruction and its answer, and this is "
        "user, assistant, user, assistant, user; set template=chat"
    )


def test_chat_learns_every_answer_with_its_end_token_and_nothing_else(tokenizer):
    tokenizer.chat_template = CHAT
    (sample,) = tokenize_instructions(tokenizer, "chat", [conversation(*TWO_TURNS)])
    assert learned(tokenizer, sample) == ["Hello 鲁</s>", "Fine.</s>"]
    # What follows the last answer is never learned, so it is not there.
    assert tokenizer.decode(sample.prompt + sample.answer) == (
        "<s><user>\nHi\n<assistant>\nHello 鲁</s>\n<user>\nAnd <s> you?\n<assistant>\nFine.</s>"
    )
    assert tokenizer.decode(sample.answer) == "Fine.</s>"


def test_an_answer_ends_before_a_turn_that_begins_at_once(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    (sample,) = tokenize_instructions(tokenizer, "chat", [conversation(*TWO_TURNS)])
    assert learned(tokenizer, sample) == ["Hello 鲁 </s>", "Fine. </s>"]


def test_chat_takes_alpaca_records_too(tokenizer):
    tokenizer.chat_template = CHAT
    samples = tokenize_instructions(tokenizer, "chat", [conversation(("user", "Add."), ("assistant", "3"))] * 2)
    assert [learned(tokenizer, sample) for sample in samples] == [["3</s>"]] * 2


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (None, ModelError, "template: chat needs a tokenizer with a chat template, and this one has none"),
        (CHAT.replace("eos_token", "''"), ModelError, "ends an answer without a special token"),
        ("{{ messages | length }}" + CHAT, ModelError, "record 1: the tokenizer's chat template writes earlier messages"),
        (
            "{{ raise_exception('no system') }}",
            DataError,
            "record 1: the chat template does not take this conversation: no sys",
        ),
    ],
)
def test_a_chat_template_that_hides_the_answers_is_refused(tokenizer, template, error, message):
    tokenizer.chat_template = template
    with pytest.raises(error, match=message):
        tokenize_instructions(tokenizer, "chat", [conversation(*TWO_TURNS)])


BEGIN, END = 1, 2


@pytest.mark.parametrize(
    ("prompt", "answer", "kept_prompt", "kept_answer"),
    [
        (8, 8, 8, 8),
        (20, 8, 8, 8),  # the front of the prompt goes
        (20, 14, 4, 12),  # a quarter of the block stays with the prompt, so the answer gives
        (3, 40, 3, 13),  # a prompt below a quarter stays whole
        (20, 40, 4, 12),
    ],
)
def test_an_overlong_sample_loses_the_front_of_its_prompt_and_then_its_answers_tail(
    prompt, answer, kept_prompt, kept_answer
):
    sample = Sample([BEGIN, *range(100, 99 + prompt)], [False] * prompt, [*range(200, 199 + answer), END])
    row = fit(sample, 16, [BEGIN])
    assert row.tokens.tolist() == [
        BEGIN,
        *range(100 + prompt - kept_prompt, 99 + prompt),
        *range(200, 199 + kept_answer),
        END,
    ]
    assert row.loss_mask.tolist() == [False] * kept_prompt + [True] * kept_answer
    assert row.targets == kept_answer


def test_an_overlong_conversation_keeps_the_loss_on_what_is_left_of_earlier_answers():
    sample = Sample([10, 11, 12, 13, 14, 15], [False, False, True, True, True, False], [20, 21, 22, END])
    row = fit(sample, 8, [])
    assert row.tokens.tolist() == [12, 13, 14, 15, 20, 21, 22, END]
    assert row.loss_mask.tolist() == [True, True, True, False, True, True, True, True]
    assert row.targets == 6
