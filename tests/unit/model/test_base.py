"""Resizing a base model, on small models of random weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from orchestrator.errors import ModelError
from orchestrator.model.base import EMBEDDING, HEAD, resize_base
from orchestrator.schema.recipe import RandomBase
from orchestrator.stages.random_base import write_random_base
from orchestrator.vocabulary.training import train_base_model

IDS = torch.tensor([[1, 5, 17, 29, 3]])
STORY = ["Once upon a time there was a little girl who loved her little dog."] * 20


def double(_name: str, matrix: Tensor) -> Tensor:
    return torch.cat([matrix, matrix.flip(0)])


def save_base(folder: Path, *, tied: bool = False, shard_size: str = "5GB") -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size=shard_size)
    return folder


def assert_same_logits(source: Path, target: Path) -> None:
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (source, target)]
    with torch.no_grad():
        before, after = (model(IDS, output_hidden_states=True) for model in models)
    assert torch.equal(after.hidden_states[-1], before.hidden_states[-1])
    # A matrix product of another width sums in another order.
    torch.testing.assert_close(after.logits[..., :30], before.logits, rtol=0, atol=1e-6)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("tied", [False, True])
def test_old_rows_stay_to_the_bit_and_logits_with_them(tmp_path: Path, tied: bool) -> None:
    source = save_base(tmp_path / "source", tied=tied)
    assert resize_base(source, tmp_path / "target", base_tokens=30, grow=double, pad_token_id=31) == 60
    old, new = tensors(source), tensors(tmp_path / "target")
    for name, tensor in old.items():
        assert torch.equal(new[name][: len(tensor)], tensor)
        assert new[name].dtype == torch.bfloat16
    assert_same_logits(source, tmp_path / "target")


def test_a_tied_base_is_written_untied(tmp_path: Path) -> None:
    source = save_base(tmp_path / "source", tied=True)
    assert HEAD not in tensors(source)
    resize_base(source, tmp_path / "target", base_tokens=30, grow=double, pad_token_id=None)
    new = tensors(tmp_path / "target")
    assert torch.equal(new[HEAD], new[EMBEDDING])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_configuration_says_the_new_size_and_generation_config_stays(tmp_path: Path) -> None:
    source = save_base(tmp_path / "source")
    resize_base(source, tmp_path / "target", base_tokens=30, grow=double, pad_token_id=31)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "target"))
    assert after == before | {"vocab_size": 60, "pad_token_id": 31, "tie_word_embeddings": False}
    assert (tmp_path / "target/generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_shards_keep_their_names_and_the_index_counts_anew(tmp_path: Path, tied: bool) -> None:
    source = save_base(tmp_path / "source", tied=tied, shard_size="3KB")
    resize_base(source, tmp_path / "target", base_tokens=30, grow=double, pad_token_id=None)
    names = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in (source, tmp_path / "target")]
    assert names[0] == names[1]
    assert len(names[0]) > 2
    index = json.loads((tmp_path / "target/model.safetensors.index.json").read_text())
    new = tensors(tmp_path / "target")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in new.values())
    assert all(name in load_file(tmp_path / "target" / shard) for name, shard in index["weight_map"].items())
    assert index["weight_map"].keys() == new.keys()
    assert_same_logits(source, tmp_path / "target")


def test_a_base_smaller_than_its_tokenizer_is_refused(tmp_path: Path) -> None:
    source = save_base(tmp_path / "source")
    with pytest.raises(ModelError, match="base has 30 rows but its tokenizer 31 tokens"):
        resize_base(source, tmp_path / "target", base_tokens=31, grow=double, pad_token_id=None)


def test_another_layout_is_refused_with_what_was_found(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "source")
    with pytest.raises(ModelError, match=r"no tensor model.embed_tokens.weight; outside its blocks it has .*wte.weight"):
        resize_base(tmp_path / "source", tmp_path / "target", base_tokens=30, grow=double, pad_token_id=None)


def test_random_base_is_the_same_for_a_seed_and_loads_in_bf16(tmp_path: Path) -> None:
    base = RandomBase(
        kind="random",
        text=("unused",),
        pieces=320,
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=4,
        num_key_value_heads=2,
        max_positions=128,
    )
    trained = tmp_path / "trained.model"
    trained.write_bytes(train_base_model(STORY, pieces=base.pieces).SerializeToString())
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        write_random_base(base, trained, tmp_path / name, seed)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second", "other")]
    assert files[0] == files[1]
    assert files[0]["model.safetensors"] != files[2]["model.safetensors"]
    assert {"config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"} <= files[0].keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert model.dtype == torch.bfloat16
    assert model.config.num_key_value_heads == 2
