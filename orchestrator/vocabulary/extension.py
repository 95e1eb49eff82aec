"""A base tokenizer's folder, extended by a language's pieces or kept as it is."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.contents import TOKENIZER_FILES
from orchestrator.errors import ModelError
from orchestrator.vocabulary.merge import check_mergeable, merge_published, merge_reachable
from orchestrator.vocabulary.pieces import ModelProto, read_model
from orchestrator.vocabulary.rows import pieces_of_new_tokens
from orchestrator.vocabulary.tokenizer import load_tokenizer, token_count, with_added_tokens, write_tokenizer

_MERGES = {"published": merge_published, "reachable": merge_reachable}
_KEPT_FILES = (*TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class Extension:
    """What a tokenizer gained."""

    base_tokens: int
    pieces_of_new_tokens: list[list[int]]
    """For each new token the base's ids for its text."""
    dropped: dict[str, int]
    """Pieces of the new language that were not taken, by reason."""


def extend_tokenizer(
    source: Path, folder: Path, language: ModelProto, *, merge: Literal["reachable", "published"], pad_token: str | None
) -> Extension:
    """Writes the tokenizer of `source` with the pieces of `language` to `folder`.

    `pad_token` is appended where the base has none. Raises ModelError for a base without a BPE tokenizer.model.
    """
    base_tokenizer = load_tokenizer(source)
    try:
        base = read_model(source / "tokenizer.model")
        check_mergeable(base)
    except ModelError as error:
        raise ModelError(f"{error}; set stages.vocabulary.merge=none to keep the base's tokenizer") from error
    base = with_added_tokens(base, base_tokenizer)
    pad = None if base_tokenizer.pad_token else pad_token
    merged = _MERGES[merge](base, language, pad)
    write_tokenizer(folder, merged.model, base_tokenizer, pad)
    return Extension(len(base.pieces), pieces_of_new_tokens(base, merged.model, pad), merged.dropped)


def keep_tokenizer(source: Path, folder: Path) -> Extension:
    """Copies the tokenizer of `source`, of whatever kind, to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _KEPT_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return Extension(token_count(load_tokenizer(folder)), [], {})
