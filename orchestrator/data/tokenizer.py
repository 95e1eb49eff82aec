"""The tokenizer of a folder, and the ids it gives to text."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a local folder; raises ModelError when there is none, or it cannot end a text."""
    from transformers import AutoTokenizer  # noqa: PLC0415  takes seconds

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} holds no tokenizer that transformers can load: {error}") from error
    if tokenizer is None:
        raise ModelError(f"{folder}: transformers knows no tokenizer for it")
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{folder}: its tokenizer has no end-of-text token; set eos_token in tokenizer_config.json")
    return tokenizer


def text_ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text alone, without special tokens."""
    # A web page that strikes <s>words</s> out must not begin and end documents.
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        # More than twice as fast as through transformers, which asks where in the text each token lies.
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    encoding = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoding["input_ids"]


def begin_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What a text begins with: the begin-of-text token, or nothing for tokenizers that have none."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
