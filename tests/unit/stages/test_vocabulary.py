"""The vocabulary stage as a whole, from text to a base model that loads."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.contents import DataFile, find_data
from orchestrator.errors import ModelError
from orchestrator.schema.recipe import RandomBase
from orchestrator.schema.stages import VocabularyStage
from orchestrator.stages.vocabulary import run_vocabulary
from orchestrator.vocabulary.pieces import processor, read_model
from orchestrator.vocabulary.tokenizer import load_tokenizer

SHARED = Path(os.environ.get("ORCHESTRATOR_SHARED_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
STORIES = SHARED / "stories260k"

POEMS = ["床前明月光，疑是地上霜。举头望明月，低头思故乡。", "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"] * 10
STORY = ["Once upon a time there was a little girl who loved her little dog. They played in the park."] * 10
RANDOM = RandomBase(
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


def run(folder: Path, base: Path | RandomBase = RANDOM, **settings: Any) -> dict[str, Any]:
    stage = VocabularyStage.model_validate({"kind": "vocabulary", "pieces": 80, "character_coverage": 1.0} | settings)
    texts = _files(folder.parent, "poems", POEMS), _files(folder.parent, "story", STORY)
    return run_vocabulary(stage, base, text=texts[0], base_text=texts[1], folder=folder, seed=1)


@pytest.mark.parametrize("merge", ["reachable", "published"])
def test_a_random_base_becomes_a_larger_one_that_loads(tmp_path: Path, merge: str) -> None:
    results = run(tmp_path / "stage", merge=merge)
    assert json.loads(json.dumps(results)) == results
    tokenizer = load_tokenizer(tmp_path / "stage/base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stage/base")
    assert len(tokenizer) == results["tokens"] == results["base_tokens"] + results["added_tokens"]
    assert results["language_pieces"] == results["added_tokens"] - 1 + sum(results["dropped_pieces"].values())
    assert model.config.vocab_size == results["rows"] == results["tokens"] + results["padding_rows"]
    assert results["rows"] % 64 == 0
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model(**tokenizer("明月 little", return_tensors="pt")).logits.shape[-1] == results["rows"]


def test_it_leaves_the_tokenizer_and_the_base_and_nothing_else(tmp_path: Path) -> None:
    run(tmp_path / "stage")
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["base", "tokenizer"]
    for path in (tmp_path / "stage/tokenizer").iterdir():
        assert (tmp_path / "stage/base" / path.name).read_bytes() == path.read_bytes()


def test_it_compresses_the_new_language_and_leaves_the_base_language(tmp_path: Path) -> None:
    compression = run(tmp_path / "stage")["compression"]
    new, old = compression["new_language"], compression["base_language"]
    assert new["tokens_per_character_after"] < 0.6 * new["tokens_per_character_before"]
    assert old["tokens_after"] == old["tokens_before"]


def test_running_again_gives_the_same_bytes(tmp_path: Path) -> None:
    run(tmp_path / "first", new_rows="normal")
    run(tmp_path / "second", new_rows="normal")
    files = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "first", tmp_path / "second")
    ]
    assert files[0] == files[1]


def test_a_given_sentencepiece_model_is_taken(tmp_path: Path) -> None:
    run(tmp_path / "trained")
    given = tmp_path / "trained/tokenizer/tokenizer.model"
    results = run(tmp_path / "stage", sentencepiece_model=str(given))
    assert results["language_pieces"] == len(read_model(given).pieces)
    with pytest.raises(ModelError, match=r"missing\.model is no file"):
        run(tmp_path / "stage", sentencepiece_model=str(tmp_path / "missing.model"))


def test_without_a_merge_only_padding_rows_are_added(tmp_path: Path) -> None:
    results = run(tmp_path / "stage", merge="none", pad_to_multiple=100)
    assert (results["base_tokens"], results["added_tokens"], results["rows"]) == (320, 0, 400)
    assert results["compression"]["new_language"]["tokens_after"] == results["compression"]["new_language"]["tokens_before"]


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not there")
def test_a_real_base_keeps_its_rows_and_logits_and_gains_means_of_pieces(tmp_path: Path) -> None:
    results = run(tmp_path / "stage", STORIES)
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (STORIES, tmp_path / "stage/base"))
    encode = processor(read_model(STORIES / "tokenizer.model")).encode
    ids = torch.tensor([[1, *encode("Once upon a time, there was a little girl named Lily.")]])
    with torch.no_grad():
        torch.testing.assert_close(after(ids).logits[..., :512], before(ids).logits, rtol=0, atol=1e-4)
    old, new = (model.get_input_embeddings().weight for model in (before, after))
    assert torch.equal(new[:512], old)
    merged = read_model(tmp_path / "stage/base/tokenizer.model")
    for id_ in range(512, results["tokens"] - 1):
        # The first token of the base's encoding is the space that SentencePiece puts before every text.
        pieces = encode(merged.pieces[id_].piece)[1:]
        torch.testing.assert_close(new[id_], old[pieces].mean(0))
        torch.testing.assert_close(after.lm_head.weight[id_], before.lm_head.weight[pieces].mean(0))


def _files(folder: Path, name: str, texts: list[str]) -> tuple[DataFile, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return find_data("text", [str(path)])
