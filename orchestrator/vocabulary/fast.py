"""A SentencePiece byte-pair encoding in the form of the `tokenizers` library."""

from collections.abc import Collection
from itertools import chain

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from orchestrator.vocabulary.pieces import NORMAL, SPACE, USER_DEFINED, ModelProto

Merge = tuple[str, str]


def has_ties(model: ModelProto) -> bool:
    """Whether pieces compete with equal scores: SentencePiece then goes from left to right, which ranks cannot say.

    LLaMA's runs of spaces all have one score, but in these the two agree.
    """
    merged = (piece for piece in model.pieces if piece.type == NORMAL and len(piece.piece) > 1)
    scores = [piece.score for piece in merged if piece.piece.strip(SPACE)]
    return len(set(scores)) < len(scores)


def fast_tokenizer(model: ModelProto, special: Collection[str], begin: list[str], end: list[str]) -> Tokenizer:
    """The tokenizer with the ids of `model`; `begin` and `end` are the special tokens put around a text."""
    vocabulary = {piece.piece: id_ for id_, piece in enumerate(model.pieces)}
    unknown = model.trainer_spec.unk_piece
    bpe = BPE(vocab=vocabulary, merges=_merges(model, vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    prefix = model.normalizer_spec.add_dummy_prefix
    # Metaspace, which LlamaTokenizer uses, puts no prefix before a text that begins with a space; SentencePiece does.
    before = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after])
    tokenizer.add_special_tokens([_added(piece.piece) for piece in model.pieces if piece.piece in special])
    tokenizer.add_tokens([_added(piece.piece) for piece in model.pieces if piece.type == USER_DEFINED])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", *end, *begin, "$B:1", *end],
        special_tokens=[(token, vocabulary[token]) for token in dict.fromkeys(begin + end)],
    )
    return tokenizer


def _added(token: str) -> AddedToken:
    return AddedToken(token, normalized=False)


def _merges(model: ModelProto, vocabulary: dict[str, int]) -> list[Merge]:
    """Every way to make a piece of two others, the best score first; equal scores stay in the order of their ids."""
    by_score = sorted((piece for piece in model.pieces if piece.type == NORMAL), key=lambda piece: -piece.score)
    return list(chain.from_iterable(_splits(piece.piece, vocabulary) for piece in by_score))


def _splits(piece: str, vocabulary: dict[str, int]) -> list[Merge]:
    splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
    known = [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
    return sorted(known, key=lambda split: (vocabulary[split[0]], vocabulary[split[1]]))
