"""A tiny LLaMA with a tokenizer, and rows of the text that ships with the project."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.contents import find_data
from orchestrator.data.documents import read_documents
from orchestrator.data.part import Preparation
from orchestrator.data.prepare import prepare
from orchestrator.schema.recipe import RandomBase
from orchestrator.stages.random_base import write_random_base
from orchestrator.vocabulary.training import train_base_model

TINY = RandomBase(
    kind="random",
    text=("sample:text_english.jsonl",),
    pieces=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_key_value_heads=2,
    max_positions=256,
)


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model trained on the English sample."""
    documents: Iterator[str] = read_documents("text", find_data("text", TINY.text))
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    path.write_bytes(train_base_model(documents, pieces=TINY.pieces).SerializeToString())
    return path


@pytest.fixture(scope="session")
def base(tokenizer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of two layers and random weights, in bf16."""
    folder = tmp_path_factory.mktemp("base")
    write_random_base(TINY, tokenizer_model, folder, seed=1)
    return folder


@pytest.fixture(scope="session")
def another_base(tokenizer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes and the same tokenizer, other weights."""
    folder = tmp_path_factory.mktemp("another_base")
    write_random_base(TINY, tokenizer_model, folder, seed=2)
    return folder


@pytest.fixture(scope="session")
def text_rows(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text in rows of 64 tokens, all of which carry loss."""
    files = find_data("text", ["sample:text_english.jsonl"])
    return prepare(Preparation("next_token", base, "text", files, block_length=64), tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="session")
def answer_rows(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Instructions in rows of different lengths, whose answers alone carry loss."""
    files = find_data("instructions", ["sample:instructions.json"])
    return prepare(Preparation("answers", base, "instructions", files, block_length=192), tmp_path_factory.mktemp("rows"))
