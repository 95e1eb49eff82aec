"""Files and tokenizers that the tests of orchestrator/data read."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.contents import DataFile
from orchestrator.data.tokenizer import load_tokenizer

SHARED = Path(os.environ.get("ORCHESTRATOR_SHARED_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], DataFile]:
    """Writes a data file; its hash is only a stand-in, for nothing here reads it."""

    def write_file(name: str, content: str | bytes) -> DataFile:
        path = tmp_path / name
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return DataFile(str(path), "0" * 64)

    return write_file


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}; set ORCHESTRATOR_SHARED_DATA")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """A real tokenizer of 512 pieces: <s> is 1, </s> is 2, and there is no chat template."""
    return shared / "stories260k"


@pytest.fixture
def tokenizer(stories: Path):
    """Freshly loaded, so that a test may give it a chat template."""
    return load_tokenizer(stories)


@pytest.fixture(scope="session")
def without_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as Qwen's: bytes, an end-of-text token, and no begin-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    bytes_alone = Tokenizer(models.BPE(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("without_bos")
    PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder
