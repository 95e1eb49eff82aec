"""The vocabulary stage: a tokenizer extended for the new language, and the base model sized to it.

It leaves `tokenizer/`, and `base/` with the resized model and the same tokenizer beside it.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.contents import DataFile
from orchestrator.data.documents import read_documents
from orchestrator.model.base import resize_base
from orchestrator.model.loading import load_config
from orchestrator.schema.recipe import RandomBase
from orchestrator.schema.stages import VocabularyStage
from orchestrator.stages.random_base import write_random_base
from orchestrator.vocabulary.compression import Encode, compression, sample_of
from orchestrator.vocabulary.extension import Extension, extend_tokenizer, keep_tokenizer
from orchestrator.vocabulary.pieces import ModelProto, processor, read_model
from orchestrator.vocabulary.rows import Growth
from orchestrator.vocabulary.tokenizer import check_same_ids, load_tokenizer, text_ids, write_tokenizer
from orchestrator.vocabulary.training import train_base_model, train_language_model

_EXAMPLE_CHARACTERS = 40


def run_vocabulary(
    stage: VocabularyStage,
    base: Path | RandomBase,
    *,
    text: Sequence[DataFile],
    base_text: Sequence[DataFile],
    folder: Path,
    seed: int,
) -> dict[str, Any]:
    """Writes `folder/tokenizer` and `folder/base`, and gives what was counted.

    `text` is in the new language, `base_text` in the base's; a RandomBase's tokenizer is trained on the latter.
    """
    samples = {
        "new_language": sample_of(read_documents("text", text)),
        "base_language": sample_of(read_documents("base_text", base_text)),
    }
    with _folder_of(base, base_text, folder, seed) as source:
        if stage.merge == "none":
            extension, counts = keep_tokenizer(source, folder / "tokenizer"), {}
        else:
            language, counts = _language_model(stage, text)
            extension = extend_tokenizer(
                source, folder / "tokenizer", language, merge=stage.merge, pad_token=stage.pad_token
            )
        rows = _write_base(stage, extension, source, folder, seed)
        if stage.merge != "none":
            check_same_ids(folder / "base", [text for sample in samples.values() for text in sample])
        before, after = _encoder(source, stage), _encoder(folder / "base", stage)
        examples = _examples(samples, source, folder / "base", stage)
        return counts | _sizes(extension, rows) | _compressions(samples, before, after) | examples


@contextmanager
def _folder_of(base: Path | RandomBase, base_text: Sequence[DataFile], folder: Path, seed: int) -> Iterator[Path]:
    """The base model's folder; a random one lives only as long as the stage needs it."""
    if isinstance(base, Path):
        yield base
        return
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".random_base.", dir=folder) as temporary:
        source = Path(temporary) / "base"
        model = train_base_model(read_documents("base_model.text", base_text), pieces=base.pieces)
        trained = Path(temporary) / "trained.model"
        trained.write_bytes(model.SerializeToString())
        write_random_base(base, trained, source, seed)
        # From here on its tokenizer gives the same ids in both libraries, whatever is merged into it.
        write_tokenizer(source, model, load_tokenizer(source), pad_token=None)
        yield source


def _language_model(stage: VocabularyStage, text: Sequence[DataFile]) -> tuple[ModelProto, dict[str, int]]:
    """The SentencePiece model of the new language, given or trained here, and how many pieces that yielded."""
    if stage.sentencepiece_model is not None:
        model = read_model(Path(stage.sentencepiece_model).expanduser())
        return model, {"language_pieces": len(model.pieces)}
    documents = read_documents("text", text)
    model = train_language_model(documents, pieces=stage.pieces, character_coverage=stage.character_coverage)
    return model, {"language_pieces_asked": stage.pieces, "language_pieces": len(model.pieces)}


def _write_base(stage: VocabularyStage, extension: Extension, source: Path, folder: Path, seed: int) -> int:
    growth = Growth(
        base_tokens=extension.base_tokens,
        parts=extension.pieces_of_new_tokens,
        how=stage.new_rows,
        seed=seed,
        standard_deviation=load_config(source).initializer_range,
        pad_to_multiple=stage.pad_to_multiple,
    )
    rows = resize_base(
        source,
        folder / "base",
        base_tokens=growth.base_tokens,
        grow=growth,
        pad_token_id=load_tokenizer(folder / "tokenizer").pad_token_id,
    )
    shutil.copytree(folder / "tokenizer", folder / "base", dirs_exist_ok=True)
    return rows


def _encoder(folder: Path, stage: VocabularyStage) -> Encode:
    """SentencePiece itself where there is a merge: what transformers makes of a base's tokenizer.model differs a little."""
    if stage.merge != "none":
        return processor(read_model(folder / "tokenizer.model")).encode
    return partial(text_ids, load_tokenizer(folder))


def _examples(samples: dict[str, list[str]], source: Path, target: Path, stage: VocabularyStage) -> dict[str, Any]:
    """The begin of each sample, in the pieces that it had and has."""
    before, after = _cutter(source, stage), _cutter(target, stage)
    begins = [" ".join(texts[0].split())[:_EXAMPLE_CHARACTERS] for texts in samples.values() if texts]
    return {"examples": [{"text": text, "before": before(text), "after": after(text)} for text in begins]}


def _cutter(folder: Path, stage: VocabularyStage) -> Callable[[str], list[str]]:
    """Of a text, its pieces."""
    if stage.merge != "none":
        return partial(processor(read_model(folder / "tokenizer.model")).encode, out_type=str)
    tokenizer = load_tokenizer(folder)
    return lambda text: [str(token) for token in tokenizer.convert_ids_to_tokens(text_ids(tokenizer, text))]


def _sizes(extension: Extension, rows: int) -> dict[str, Any]:
    tokens = extension.base_tokens + len(extension.pieces_of_new_tokens)
    return {
        "base_tokens": extension.base_tokens,
        "added_tokens": len(extension.pieces_of_new_tokens),
        "dropped_pieces": extension.dropped,
        "tokens": tokens,
        "rows": rows,
        "padding_rows": rows - tokens,
    }


def _compressions(samples: dict[str, list[str]], before: Encode, after: Encode) -> dict[str, Any]:
    """Tokens per character on each sample that there is."""
    results = {}
    for name, texts in samples.items():
        if texts:
            measured = compression(texts, before, after)
            rates = {"tokens_per_character_before": measured.before, "tokens_per_character_after": measured.after}
            results[name] = asdict(measured) | rates
    return {"compression": results}
