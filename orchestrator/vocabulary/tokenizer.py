"""Tokenizer folders whose ids are the same in transformers and in SentencePiece.

transformers 5's own conversion is not that: it orders merges by id where SentencePiece goes by score, and drops a
leading space, so all 30 articles of our English sample get other ids than LLaMA was trained with.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from orchestrator.errors import ModelError
from orchestrator.store import write_bytes, write_json
from orchestrator.vocabulary.fast import fast_tokenizer, has_ties
from orchestrator.vocabulary.pieces import CONTROL, USER_DEFINED, ModelProto, add_piece, copy_of

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder, as transformers loads it."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} holds no tokenizer that transformers can load: {error}") from error
    assert tokenizer is not None
    return tokenizer


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text as SentencePiece would give them: what looks like a special token is text too."""
    # verbose would warn of texts longer than the model's context.
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)


def token_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id."""
    return max(tokenizer.get_vocab().values()) + 1


def with_added_tokens(model: ModelProto, tokenizer: PreTrainedTokenizerBase) -> ModelProto:
    """The SentencePiece model and, as pieces of it, the tokens that the folder's other files put behind it."""
    complete = copy_of(model)
    for id_ in range(len(model.pieces), token_count(tokenizer)):
        token = tokenizer.added_tokens_decoder.get(id_)
        if token is None:
            raise ModelError(
                f"the base tokenizer has token {id_:,}, but its tokenizer.model holds {len(model.pieces):,} pieces; "
                "the two must belong together, or set stages.vocabulary.merge=none"
            )
        add_piece(complete, token.content, score=0, kind=CONTROL if token.special else USER_DEFINED)
    return complete


def write_tokenizer(folder: Path, model: ModelProto, base: PreTrainedTokenizerBase, pad_token: str | None) -> None:
    """Writes a folder for AutoTokenizer and for SentencePiece; all but the pieces is carried over from `base`.

    A model whose scores tie (`has_ties`) gets transformers' slow class, which runs SentencePiece itself, has no
    offsets, and decodes a byte to its piece (<0x0A>); a fast one would give other ids to 2 % of the tokens.
    """
    settings = _settings(model, base, pad_token)
    ids = base("a")["input_ids"]
    # What the base does counts, not what its configuration says: transformers 5 ignores some of that.
    begin = [base.bos_token] if ids[0] == base.bos_token_id else []
    end = [base.eos_token] if ids[-1] == base.eos_token_id else []
    if has_ties(model):
        pattern = "_".join(name for name, tokens in (("bos", begin), ("eos", end)) if tokens) or "none"
        settings |= {"tokenizer_class": "SentencePieceBackend", "legacy": True, "special_tokens_pattern": pattern}
    else:
        # Every release of transformers knows this name and takes tokenizer.json as it is; LlamaTokenizer rebuilds it.
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        special = {settings[role] for role in ROLES if role in settings}.union(settings["extra_special_tokens"])
        content = fast_tokenizer(model, special, begin, end).to_str(pretty=True)
        write_bytes(folder / "tokenizer.json", content.encode("utf-8"))
    write_bytes(folder / "tokenizer.model", model.SerializeToString())
    write_json(folder / "tokenizer_config.json", settings | {"add_bos_token": bool(begin), "add_eos_token": bool(end)})
    if isinstance(base.chat_template, str):
        write_bytes(folder / "chat_template.jinja", base.chat_template.encode("utf-8"))


def check_same_ids(folder: Path, texts: Iterable[str]) -> None:
    """Raises ModelError naming the first text to which transformers and SentencePiece give different ids."""
    tokenizer = load_tokenizer(folder)
    sentencepiece = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in texts:
        given = text_ids(tokenizer, text)
        expected = sentencepiece.encode(text)
        if given != expected:
            differs = next((i for i, pair in enumerate(zip(given, expected, strict=False)) if pair[0] != pair[1]), 0)
            raise ModelError(
                f"{folder}: transformers and SentencePiece tokenize {text[:80]!r} differently; from token {differs} on "
                f"transformers gives {given[differs : differs + 5]}, SentencePiece {expected[differs : differs + 5]}"
            )


def _settings(model: ModelProto, base: PreTrainedTokenizerBase, pad_token: str | None) -> dict[str, Any]:
    roles = {role: getattr(base, role) for role in ROLES}
    roles["pad_token"] = roles["pad_token"] or pad_token
    control = (piece.piece for piece in model.pieces if piece.type == CONTROL)
    extra = dict.fromkeys((*map(str, base.extra_special_tokens), *control))
    return {
        **{role: token for role, token in roles.items() if token is not None},
        "extra_special_tokens": [token for token in extra if token not in roles.values()],
        "model_max_length": base.model_max_length,
        "padding_side": base.padding_side,
        "clean_up_tokenization_spaces": False,
    }
