"""Training SentencePiece models on little text."""

from itertools import pairwise

import pytest

from orchestrator.errors import DataError
from orchestrator.vocabulary.pieces import processor
from orchestrator.vocabulary.training import even_sample, train_base_model, train_language_model

POEM = ["床前明月光，疑是地上霜。举头望明月，低头思故乡。", "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"] * 20
STORY = ["Once upon a time there was a little girl who loved her little dog.\n  They played in the park."] * 20


def test_same_text_gives_the_same_bytes() -> None:
    first, second = (train_language_model(POEM, pieces=60, character_coverage=1.0).SerializeToString() for _ in range(2))
    assert first == second
    assert train_base_model(STORY, pieces=320).SerializeToString() == train_base_model(STORY, pieces=320).SerializeToString()


def test_text_that_yields_fewer_pieces_gives_as_many_as_it_can() -> None:
    pieces = len(train_language_model(POEM, pieces=5_000, character_coverage=1.0).pieces)
    assert 40 < pieces < 1_000


def test_fewer_pieces_than_characters_are_refused() -> None:
    with pytest.raises(DataError, match=r"pieces: 10 are too few: this text needs 42 for its single characters"):
        train_language_model(POEM, pieces=10, character_coverage=1.0)


def test_empty_text_is_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        train_language_model(iter(["", "\n"]), pieces=100, character_coverage=1.0)


def test_training_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    train_language_model(POEM, pieces=60, character_coverage=1.0)
    assert capfd.readouterr() == ("", "")


def test_lines_longer_than_sentencepiece_takes_are_learned_from() -> None:
    model = train_language_model(["".join(POEM) * 10], pieces=60, character_coverage=1.0)
    assert {"月", "鸟"} <= {piece.piece for piece in model.pieces}


def test_base_model_is_made_as_llamas() -> None:
    model = train_base_model(STORY, pieces=320)
    assert [piece.piece for piece in model.pieces[:4]] == ["<unk>", "<s>", "</s>", "<0x00>"]
    text = "  two  spaces\nand 中 🤗"
    assert processor(model).decode(processor(model).encode(text)) == text


def test_even_sample_spreads_over_all_lines() -> None:
    lines = [f"{number:04}" for number in range(1_000)]
    sample = even_sample(lines, max_characters=100)
    assert sum(map(len, sample)) <= 100
    steps = {int(right) - int(left) for left, right in pairwise(sample)}
    assert len(steps) == 1
    assert int(sample[-1]) > 900
    assert even_sample(lines, max_characters=10_000) == lines
