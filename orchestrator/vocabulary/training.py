"""Trains SentencePiece models: one for the new language, and one for a random base model.

The same text gives the same bytes: SentencePiece's own sampling is random, so it is never asked to sample,
and its sums depend on the number of threads, so that is a constant.
"""

import re
from collections.abc import Iterable, Iterator
from io import BytesIO
from typing import Any

from sentencepiece import SentencePieceTrainer

from orchestrator.errors import DataError
from orchestrator.vocabulary.pieces import ModelProto

MAX_CHARACTERS = 200_000_000
"""SentencePiece holds its text in memory, some 20 bytes a character."""
_LINE_CHARACTERS = 1_000
"""SentencePiece silently skips lines above 4,192 bytes; a character takes at most 4."""
_NUM_THREADS = 16
_ONLY_ERRORS = 2


def train_language_model(texts: Iterable[str], *, pieces: int, character_coverage: float) -> ModelProto:
    """A unigram model as Chinese-LLaMA's: nmt_nfkc, no byte fallback; fewer pieces where the text yields no more.

    Raises DataError when the text is empty, or `pieces` cannot hold even its characters.
    """
    return _train(
        texts,
        model_type="unigram",
        vocab_size=pieces,
        character_coverage=character_coverage,
        normalization_rule_name="nmt_nfkc",
    )


def train_base_model(texts: Iterable[str], *, pieces: int) -> ModelProto:
    """A BPE model as LLaMA's: bytes for unknown characters, digits split, whitespace kept, <unk> <s> </s> first."""
    return _train(
        texts,
        model_type="bpe",
        vocab_size=pieces,
        character_coverage=0.99995,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    )


def _train(texts: Iterable[str], **settings: Any) -> ModelProto:
    lines = even_sample(_lines(texts), MAX_CHARACTERS)
    if not lines:
        raise DataError("the text to train a vocabulary on is empty")
    written = BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            hard_vocab_limit=False,
            num_threads=_NUM_THREADS,
            minloglevel=_ONLY_ERRORS,
            **settings,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1]
        if needed := re.search(r"required_chars\. \d+ vs (\d+)", reason):
            raise DataError(
                f"pieces: {settings['vocab_size']:,} are too few: this text needs {int(needed[1]):,} for its single "
                f"characters at character_coverage {settings['character_coverage']:g}; give more, or lower the coverage"
            ) from error
        raise DataError(f"SentencePiece could not train {settings['vocab_size']:,} pieces on this text: {reason}") from error
    model = ModelProto()
    model.ParseFromString(written.getvalue())
    return model


def even_sample(lines: Iterable[str], max_characters: int) -> list[str]:
    """Lines spread evenly over all of them, the same ones every time, of at most so many characters."""
    kept: list[str] = []
    characters, every = 0, 1
    for position, line in enumerate(lines):
        if position % every:
            continue
        kept.append(line)
        characters += len(line)
        while characters > max_characters and len(kept) > 1:
            kept, every = kept[::2], every * 2
            characters = sum(map(len, kept))
    return kept


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), _LINE_CHARACTERS):
                yield line[start : start + _LINE_CHARACTERS]
