"""Tokenizer folders: the same ids in transformers and in SentencePiece, and what is carried over."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from orchestrator.errors import ModelError
from orchestrator.vocabulary.extension import extend_tokenizer, keep_tokenizer
from orchestrator.vocabulary.pieces import processor, read_model
from orchestrator.vocabulary.tokenizer import check_same_ids, load_tokenizer, text_ids

SHARED = Path(os.environ.get("ORCHESTRATOR_SHARED_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
LLAMA, CHINESE = (SHARED / "tokenizers" / name for name in ("llama_32000.model", "chinese_sp_20000.model"))
pytestmark = pytest.mark.skipif(not LLAMA.is_file(), reason=f"{LLAMA} is not there")

TEXTS = (
    "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
    "國務院總理訪問義大利，越來越多的人學習漢語。",
    "Mixed 中文 and English，2024年1月1日, café naïve",
    "🤗👩‍👩‍👧 emoji 中国🇨🇳",
    "rare: 𠮷野家 \u0e01\u0e32\u0e23 \x07",
    "  leading spaces",
    " 中国  人民   共和国    ",
    "line\n\n  line\t\ttab\r\n第二行\n",
    "哈哈哈哈哈 ------- aaaaaaa 1000000",
    "what looks <s>special</s> <pad> is text",
    "   ",
    "",
)
CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "model_max_length": 77,
    "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "added_tokens_decoder": {"32000": {"content": "<|im_start|>", "special": True}},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA's tokenizer with a chat template and one added token."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer.model").write_bytes(LLAMA.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=["reachable", "published"])
def extended(request: pytest.FixtureRequest, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    extend_tokenizer(llama, folder, read_model(CHINESE), merge=request.param, pad_token="<pad>")
    return folder


def test_both_libraries_give_the_same_ids(extended: Path) -> None:
    chinese = (SHARED / "text" / "luxun_validation.jsonl").read_text(encoding="utf-8").splitlines()
    english = (SHARED / "text" / "english_wikipedia_30.txt").read_text(encoding="utf-8").splitlines()
    check_same_ids(extended, [*TEXTS, *(json.loads(line)["text"] for line in chinese), *english[:10]])


def test_special_tokens_template_and_length_are_carried_over(extended: Path) -> None:
    tokenizer = load_tokenizer(extended)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.pad_token == "<pad>"
    assert tokenizer.pad_token_id == len(read_model(extended / "tokenizer.model").pieces) - 1
    assert tokenizer("中国")["input_ids"][0] == 1
    assert tokenizer.model_max_length == 77
    assert tokenizer.apply_chat_template([{"role": "user", "content": "中"}], tokenize=False) == "中"


def test_tokens_that_the_base_folder_adds_keep_their_ids(extended: Path) -> None:
    assert read_model(extended / "tokenizer.model").pieces[32_000].piece == "<|im_start|>"
    tokenizer = load_tokenizer(extended)
    assert tokenizer("<|im_start|>中", add_special_tokens=False)["input_ids"][0] == 32_000


def test_reachable_tokenizer_decodes_to_the_text(llama: Path, tmp_path: Path) -> None:
    extend_tokenizer(llama, tmp_path, read_model(CHINESE), merge="reachable", pad_token="<pad>")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.is_fast
    assert [tokenizer.decode(text_ids(tokenizer, text)) for text in TEXTS] == list(TEXTS)


def test_writing_again_gives_the_same_files(llama: Path, tmp_path: Path) -> None:
    folders = tmp_path / "first", tmp_path / "second"
    for folder in folders:
        extend_tokenizer(llama, folder, read_model(CHINESE), merge="reachable", pad_token="<pad>")
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == second
    assert "tokenizer.json" in first


def test_different_ids_are_reported_with_the_text(llama: Path) -> None:
    # transformers' own conversion of LLaMA's tokenizer.model orders runs of spaces otherwise.
    with pytest.raises(ModelError, match="tokenize 'a  b' differently"):
        check_same_ids(llama, ["same", "a  b"])


def test_without_a_merge_the_files_stay_as_they_are(llama: Path, tmp_path: Path) -> None:
    extension = keep_tokenizer(llama, tmp_path)
    assert (extension.base_tokens, extension.pieces_of_new_tokens) == (32_001, [])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in llama.iterdir()
    }


def test_a_base_without_a_byte_pair_sentencepiece_model_is_pointed_to_no_merge(llama: Path, tmp_path: Path) -> None:
    base, target = tmp_path / "base", tmp_path / "target"
    load_tokenizer(llama).save_pretrained(base)
    (base / "tokenizer.model").unlink(missing_ok=True)
    with pytest.raises(ModelError, match=r"is no file.*set stages\.vocabulary\.merge=none"):
        extend_tokenizer(base, target, read_model(CHINESE), merge="reachable", pad_token=None)
    # Llama 3 ships a tokenizer.model that is tiktoken's.
    (base / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(ModelError, match=r"not a SentencePiece model.*set stages\.vocabulary\.merge=none"):
        extend_tokenizer(base, target, read_model(CHINESE), merge="reachable", pad_token=None)
    (base / "tokenizer.model").write_bytes(CHINESE.read_bytes())
    with pytest.raises(ModelError, match=r"not a byte-pair encoding; set stages\.vocabulary\.merge=none"):
        extend_tokenizer(base, target, read_model(CHINESE), merge="reachable", pad_token=None)


def test_new_tokens_stand_for_the_base_pieces_of_their_text(llama: Path, tmp_path: Path) -> None:
    extension = extend_tokenizer(llama, tmp_path, read_model(CHINESE), merge="reachable", pad_token="<pad>")
    merged, base = processor(read_model(tmp_path / "tokenizer.model")), processor(read_model(LLAMA))
    parts = dict(enumerate(extension.pieces_of_new_tokens, start=extension.base_tokens))
    assert [base.id_to_piece(id_) for id_ in parts[merged.piece_to_id("中国")]] == ["中", "国"]
    assert parts[merged.piece_to_id("谢")] == base.encode("谢")[1:]
    assert len(parts[merged.piece_to_id("谢")]) == 3
    assert parts[merged.pad_id()] == []
    assert all(part for id_, part in parts.items() if id_ != merged.pad_id())


def test_a_byte_level_tokenizer_is_kept_without_a_sentencepiece_model(tmp_path: Path) -> None:
    source = tmp_path / "source"
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel()
    backend.train_from_iterator(["a story", "a dog"], BpeTrainer(vocab_size=300, special_tokens=["<|end|>"]))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(source)
    extension = keep_tokenizer(source, tmp_path / "target")
    tokenizers = load_tokenizer(source), load_tokenizer(tmp_path / "target")
    assert extension.base_tokens == len(tokenizers[0])
    assert text_ids(tokenizers[1], "a story") == text_ids(tokenizers[0], "a story")
