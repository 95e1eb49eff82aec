"""A base model of another family: Qwen2 with a tied head, a byte-level tokenizer and a chat template, under ZeRO-3."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from tests.integration.command import run_command
from tests.shared_data import ROOT

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen") / "base"
    lines = (ROOT / "recipes" / "sample" / "text_chinese.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([json.loads(line)["text"] for line in lines], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(fast), **shape, **heads)).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.ray
@pytest.mark.slow
def test_a_tied_model_with_its_own_tokenizer_and_chat_template_goes_through_all_stages(qwen: Path, tmp_path: Path) -> None:
    short = [f"stages.{name}.steps=2" for name in ("embeddings", "attention", "instruct")]
    kept = ["stages.vocabulary.merge=none", "stages.instruct.template=chat"]
    completed = run_command(
        [f"base_model={qwen}", "stage=all", "zero=3", "workers=2", "tracking=none", *kept, *short], tmp_path
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    (merged,) = tmp_path.glob("runs/export-*/merged")
    assert AutoConfig.from_pretrained(merged).tie_word_embeddings is False
    assert (merged / "tokenizer.json").read_bytes() == (qwen / "tokenizer.json").read_bytes()


def test_merging_into_a_tokenizer_that_is_not_sentencepiece_is_refused_with_the_way_out(qwen: Path, tmp_path: Path) -> None:
    completed = run_command([f"base_model={qwen}"], tmp_path)
    assert completed.returncode == 2
    assert "stages.vocabulary.merge=none keeps its tokenizer" in completed.stderr
    assert not (tmp_path / "runs").exists()


def test_a_tied_head_without_a_vocabulary_stage_is_refused(qwen: Path, tmp_path: Path) -> None:
    completed = run_command([f"base_model={qwen}", "~stages.vocabulary"], tmp_path)
    assert completed.returncode == 2
    assert "its head is tied to its embedding" in completed.stderr
