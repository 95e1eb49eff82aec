"""Merges a language's pieces into a base tokenizer: as Chinese-LLaMA published it, or so that every piece is reachable.

Both append to the base model, so its ids stay. They differ in which pieces are taken and in the new pieces' scores.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.errors import ModelError
from orchestrator.vocabulary.pieces import BPE, CONTROL, NORMAL, SPACE, ModelProto, add_piece, copy_of, piece_processor


@dataclass(frozen=True)
class Merge:
    """A merged SentencePiece model, and what became of the pieces that were offered."""

    model: ModelProto
    base_pieces: int
    dropped: dict[str, int]
    """Pieces of the new language that were not taken, by reason."""

    @property
    def added(self) -> int:
        return len(self.model.pieces) - self.base_pieces


def merge_published(base: ModelProto, language: ModelProto, pad_token: str | None = None) -> Merge:
    """Chinese-LLaMA's merge to the byte: every piece the base lacks, in the file's order, each with score 0."""
    merged = copy_of(base)
    present = {piece.piece for piece in base.pieces}
    new = [piece.piece for piece in language.pieces if piece.piece not in present]
    for piece in (*new, *_missing_pad(present.union(new), pad_token)):
        add_piece(merged, piece, score=0)
    return Merge(merged, len(base.pieces), {"in_base": len(language.pieces) - len(new)})


def merge_reachable(base: ModelProto, language: ModelProto, pad_token: str | None = None) -> Merge:
    """Takes the pieces of the new script that byte-pair encoding can produce, and no others.

    A piece must hold a character of the new script (`is_of_new_script`), so text without any keeps its ids.
    Each new piece has a score of its own, below the base's: equal scores are broken from left to right by
    SentencePiece and by rank in `tokenizers`, and the two would give different ids.
    """
    present = {piece.piece for piece in base.pieces}
    new = [piece.piece for piece in language.pieces if piece.piece not in present and piece.type == NORMAL]
    of_script = [piece for piece in new if any(map(is_of_new_script, piece))]
    reachable = _reachable(base, of_script)
    merged = _with_pieces(base, reachable)
    for pad in _missing_pad(present.union(reachable), pad_token):
        # A control piece is never read from text, and the file itself says what pads.
        add_piece(merged, pad, score=0, kind=CONTROL)
        merged.trainer_spec.pad_piece = pad
    dropped = {
        "in_base": len(language.pieces) - len(new),
        "not_of_new_script": len(new) - len(of_script),
        "unreachable": len(of_script) - len(reachable),
    }
    return Merge(merged, len(base.pieces), dropped)


def is_of_new_script(character: str) -> bool:
    """A letter, vowel sign or digit beyond ASCII, or East Asian punctuation; no symbols or accents, which all share."""
    if character.isascii() or unicodedata.name(character, "").startswith("COMBINING"):
        return False
    category = unicodedata.category(character)
    wide = unicodedata.east_asian_width(character) in "WF"
    return category[0] in "LM" or category == "Nd" or (wide and category != "So")


def unreachable_pieces(model: ModelProto, first: int) -> list[str]:
    """The pieces from id `first` on that byte-pair encoding never produces.

    Merges inside a piece's span do not depend on what surrounds it, so a piece is produced somewhere
    if and only if encoding the piece alone ends in it.
    """
    encode = piece_processor(model).encode
    new = [(id_, piece) for id_, piece in enumerate(model.pieces) if id_ >= first and piece.type == NORMAL]
    return [piece.piece for id_, piece in new if encode(piece.piece) != [id_]]


def check_mergeable(base: ModelProto) -> None:
    """Raises ModelError unless pieces can be merged into this base."""
    if base.trainer_spec.model_type != BPE:
        raise ModelError("the base's tokenizer.model is not a byte-pair encoding")


def _reachable(base: ModelProto, pieces: Sequence[str]) -> list[str]:
    characters = {piece.piece for piece in base.pieces} | {piece for piece in pieces if len(piece) == 1}
    # SentencePiece joins characters that are no pieces themselves; `tokenizers` turns those into bytes first.
    spelled = [piece for piece in pieces if characters.issuperset(piece)]
    unreachable = set(unreachable_pieces(_with_pieces(base, spelled), len(base.pieces)))
    return [piece for piece in spelled if piece not in unreachable]


def _with_pieces(base: ModelProto, pieces: Sequence[str]) -> ModelProto:
    """The base and more pieces, likelier ones first; LLaMA's runs of spaces lie at -1e9, too low to go below."""
    merged = copy_of(base)
    lowest = min(piece.score for piece in base.pieces if piece.type == NORMAL and piece.piece.strip(SPACE))
    for rank, piece in enumerate(pieces, start=1):
        add_piece(merged, piece, score=lowest - rank)
    return merged


def _missing_pad(present: set[str], pad_token: str | None) -> list[str]:
    return [pad_token] if pad_token is not None and pad_token not in present else []
