"""Known answers and invariants of merging vocabularies, on Chinese-LLaMA's own files."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from orchestrator.vocabulary.fast import has_ties
from orchestrator.vocabulary.merge import Merge, is_of_new_script, merge_published, merge_reachable, unreachable_pieces
from orchestrator.vocabulary.pieces import ModelProto, add_piece, processor, read_model

SHARED = Path(os.environ.get("ORCHESTRATOR_SHARED_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
LLAMA, CHINESE = (SHARED / "tokenizers" / name for name in ("llama_32000.model", "chinese_sp_20000.model"))
pytestmark = pytest.mark.skipif(not LLAMA.is_file(), reason=f"{LLAMA} is not there")


@pytest.fixture(scope="module")
def base() -> ModelProto:
    return read_model(LLAMA)


@pytest.fixture(scope="module")
def chinese() -> ModelProto:
    return read_model(CHINESE)


@pytest.fixture(scope="module")
def published(base: ModelProto, chinese: ModelProto) -> Merge:
    return merge_published(base, chinese)


@pytest.fixture(scope="module")
def reachable(base: ModelProto, chinese: ModelProto) -> Merge:
    return merge_reachable(base, chinese, "<pad>")


def test_published_merge_is_chinese_llama_to_the_byte(published: Merge) -> None:
    assert len(published.model.pieces) == 49_953
    assert _sha256(published.model) == "e2676d4ca29ca1750f6ff203328d73b189321dc5776ceede037cbd36541d70c0"


def test_published_merge_with_pad_is_chinese_alpaca_to_the_byte(base: ModelProto, chinese: ModelProto) -> None:
    merge = merge_published(base, chinese, "[PAD]")
    assert len(merge.model.pieces) == 49_954
    assert _sha256(merge.model) == "2d967e855b1213a439df6c8ce2791f869c84b4f3b6cfacf22b86440b8192a2f8"


def test_345_pieces_of_the_published_merge_are_never_produced(published: Merge) -> None:
    unreachable = unreachable_pieces(published.model, 32_000)
    assert len(unreachable) == 345
    assert {"国务院", "意大利", "越来越"} <= set(unreachable)


def test_every_piece_of_the_reachable_merge_is_produced(reachable: Merge) -> None:
    assert reachable.added == 16_918 + 1
    assert unreachable_pieces(reachable.model, 32_000) == []


def test_every_offered_piece_is_added_or_counted_as_dropped(reachable: Merge, chinese: ModelProto) -> None:
    assert reachable.dropped == {"in_base": 2_047, "not_of_new_script": 700, "unreachable": 335}
    assert sum(reachable.dropped.values()) + reachable.added - 1 == len(chinese.pieces)


def test_reachable_merge_leaves_english_alone_and_the_published_one_does_not(
    base: ModelProto, published: Merge, reachable: Merge
) -> None:
    articles = (SHARED / "text" / "english_wikipedia_30.txt").read_text(encoding="utf-8").splitlines()
    before = [processor(base).encode(article) for article in articles]
    assert len(before) == 30
    assert [processor(reachable.model).encode(article) for article in articles] == before
    changed = [processor(published.model).encode(article) for article in articles]
    assert all(ids != old for ids, old in zip(changed, before, strict=True))


def test_reachable_merge_compresses_chinese_as_the_published_one_within_one_percent(
    published: Merge, reachable: Merge
) -> None:
    lines = (SHARED / "text" / "luxun_validation.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    tokens = [sum(map(len, processor(merge.model).encode(texts))) for merge in (published, reachable)]
    assert tokens[1] < 1.01 * tokens[0]


def test_new_scores_are_distinct_and_the_pad_piece_is_named_by_the_file(published: Merge, reachable: Merge) -> None:
    assert not has_ties(reachable.model)
    assert has_ties(published.model)
    assert processor(reachable.model).pad_id() == len(reachable.model.pieces) - 1
    assert processor(published.model).pad_id() == -1


def test_a_pad_piece_that_is_there_already_is_not_added_again(base: ModelProto, chinese: ModelProto) -> None:
    with_pad = ModelProto()
    with_pad.CopyFrom(base)
    add_piece(with_pad, "<pad>", score=0)
    assert [piece.piece for piece in merge_reachable(with_pad, chinese, "<pad>").model.pieces].count("<pad>") == 1


@pytest.mark.parametrize(
    ("character", "expected"), [(c, True) for c in "中、。Ａяéक१ไ"] + [(c, False) for c in "a1,—“◆°〓\u0301▁"]
)
def test_letters_digits_and_wide_punctuation_are_of_a_new_script(character: str, expected: bool) -> None:
    assert is_of_new_script(character) is expected


def _sha256(model: ModelProto) -> str:
    return hashlib.sha256(model.SerializeToString()).hexdigest()
