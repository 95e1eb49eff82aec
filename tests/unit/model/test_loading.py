"""Loading a base model runs nothing that came with it: real folders with code in them, which makes a file where it runs."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from orchestrator.contents import base_model_folder
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.errors import ModelError
from orchestrator.model.base import resize_base
from orchestrator.model.loading import load_config, load_model, shape_model

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self._marker,)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A small model with its tokenizer, in safetensors."""
    folder = tmp_path / "base"
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=30, **shape)).save_pretrained(folder)
    words = {"type": "WordLevel", "vocab": {f"word{id_}": id_ for id_ in range(30)}, "unk_token": "word0"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": words}))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "word1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that appears where something ran."""
    # transformers copies a model's own code to here before it imports it.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    # Left to itself, transformers asks in the terminal whether to run it.
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))
    return tmp_path / "it_ran"


def say(file: Path, **entries: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def write_pickle(file: Path, marker: Path) -> None:
    torch.save({"lm_head.weight": torch.zeros(30, 16), "payload": Payload(marker)}, file)
    torch.load(file, weights_only=False)
    assert marker.is_file(), "the payload does nothing, and what follows would show nothing"
    marker.unlink()


def pickle_alone(base: Path, marker: Path) -> None:
    (base / "model.safetensors").unlink()
    write_pickle(base / "pytorch_model.bin", marker)


def pickle_among_the_shards(base: Path, marker: Path) -> None:
    (base / "model.safetensors").rename(base / "shard.safetensors")
    write_pickle(base / "shard.bin", marker)
    listed = {"lm_head.weight": "shard.bin", "model.norm.weight": "shard.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def pickle_as_the_weights_of_the_configuration(base: Path, marker: Path) -> None:
    write_pickle(base / "adapter_model.bin", marker)
    say(base / "config.json", transformers_weights="adapter_model.bin")


def pickle_as_an_adapter(base: Path, marker: Path) -> None:
    write_pickle(base / "adapter_model.bin", marker)
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    (base / "adapter_config.json").write_text(json.dumps(lora))


def code_of_the_model(base: Path, marker: Path) -> None:
    (base / "modeling_own.py").write_text(CODE.format(marker=str(marker)))
    code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    say(base / "config.json", model_type="own", auto_map=code)
    AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
    assert marker.is_file(), "the code does nothing, and what follows would show nothing"
    marker.unlink()


def code_of_the_tokenizer(base: Path, marker: Path) -> None:
    (base / "tokenization_own.py").write_text(CODE.format(marker=str(marker)))
    code = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    say(base / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=code)
    AutoTokenizer.from_pretrained(base, trust_remote_code=True)
    assert marker.is_file(), "the code does nothing, and what follows would show nothing"
    marker.unlink()


TRAPS = (
    pickle_alone,
    pickle_among_the_shards,
    pickle_as_the_weights_of_the_configuration,
    pickle_as_an_adapter,
    code_of_the_model,
    code_of_the_tokenizer,
)


@pytest.mark.parametrize("set_trap", TRAPS)
def test_a_model_with_a_trap_is_not_loaded_and_the_trap_stays_shut(
    base: Path, marker: Path, set_trap: Callable[[Path, Path], None]
) -> None:
    load_model(base, "fp32")
    set_trap(base, marker)
    with pytest.raises(ModelError):
        load_model(base, "fp32")
    assert not marker.exists()


def test_pickled_weights_alone_are_refused_at_planning(base: Path, marker: Path) -> None:
    pickle_alone(base, marker)
    with pytest.raises(ModelError, match=r"its weights are pickled \(pytorch_model\.bin\)"):
        base_model_folder(str(base))
    assert not marker.exists()


def test_a_pickle_beside_safetensors_is_left_alone(base: Path, marker: Path) -> None:
    write_pickle(base / "pytorch_model.bin", marker)
    load_model(base_model_folder(str(base)), "fp32")
    assert not marker.exists()


@pytest.mark.parametrize("read", [load_config, shape_model])
def test_the_configuration_is_read_without_the_models_code(base: Path, marker: Path, read: Callable[[Path], object]) -> None:
    code_of_the_model(base, marker)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        read(base)
    assert not marker.exists()


def test_a_tokenizer_is_read_without_its_code(base: Path, marker: Path) -> None:
    assert load_tokenizer(base).eos_token_id == 1
    code_of_the_tokenizer(base, marker)
    with pytest.raises(ModelError, match="contains custom code"):
        load_tokenizer(base)
    assert not marker.exists()


def test_nothing_is_written_outside_the_folder_of_a_resized_model(base: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").rename(tmp_path / "outside.safetensors")
    listed = {"model.embed_tokens.weight": "../outside.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    before = (tmp_path / "outside.safetensors").read_bytes()
    with pytest.raises(ModelError, match="no safetensors file of its own folder"):
        resize_base(base, tmp_path / "target", base_tokens=30, grow=lambda _, matrix: matrix * 2, pad_token_id=None)
    assert (tmp_path / "outside.safetensors").read_bytes() == before
    assert not (tmp_path / "target").exists()
