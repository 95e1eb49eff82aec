"""An adapter that was written is what was learned: for stock PEFT in a process of its own, and for the next stage."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from orchestrator.checkpoint.adapter import read_adapter, verify_written, write_adapter
from orchestrator.checkpoint.manifest import MANIFEST_NAME, Origin
from orchestrator.contents import TOKENIZER_FILES, base_model_hash, tokenizer_hash
from orchestrator.data.batches import evaluation_batches
from orchestrator.data.rows import PreparedRows
from orchestrator.errors import ModelError, TrainingError
from orchestrator.model.adapters import adapter_parameters, adapter_tensors, attach, count_parameters, load_tensors
from orchestrator.model.loading import load_model
from orchestrator.plan.adaptation import Adaptation
from orchestrator.plan.targets import LoraShape

ATTENTION = {name: LoraShape(8, 32) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
MLP = {name: LoraShape(4, 8) for name in ("gate_proj", "up_proj", "down_proj")}
BOTH = ("embed_tokens", "lm_head")
STAGES = {
    "embeddings": Adaptation(modules_to_save=("embed_tokens",), trained_modules=("embed_tokens",)),
    "attention": Adaptation(ATTENTION, BOTH, tuple(ATTENTION), BOTH),
    # Two ranks in one folder: the factors of the stage before, frozen, and new ones.
    "instruct": Adaptation({**ATTENTION, **MLP}, BOTH, tuple(MLP), BOTH),
    # Another pipeline, of tables whose new rows learn: by themselves, with LoRA, frozen, and of a whole that learned before.
    "rows": Adaptation(rows_to_save=BOTH, trained_rows=BOTH),
    "rows_and_lora": Adaptation(ATTENTION, trained_lora=tuple(ATTENTION), rows_to_save=BOTH, trained_rows=("lm_head",)),
    "whole_after_rows": Adaptation(ATTENTION, BOTH[:1], trained_modules=BOTH[:1], rows_to_save=BOTH[1:]),
    "rows_of_a_whole": Adaptation(ATTENTION, BOTH[:1], rows_to_save=BOTH[1:], trained_rows=BOTH[:1]),
}
WEIGHTS_NAME = "adapter_model.safetensors"
BASE_TOKENS = 400
"""Of the base's 512; the others pass for new ones."""
LAYERS = 2
SHAPES = {
    "q_proj": (64, 64),
    "k_proj": (32, 64),
    "v_proj": (32, 64),
    "o_proj": (64, 64),
    "gate_proj": (128, 64),
    "up_proj": (128, 64),
    "down_proj": (64, 128),
}
"""Rows and columns of the base's linear layers."""
VOCABULARY, HIDDEN = 512, 64
TINY_PARAMETERS = 2 * VOCABULARY * HIDDEN + LAYERS * (sum(a * b for a, b in SHAPES.values()) + 2 * HIDDEN) + HIDDEN

# Measured relative to the largest logit: 0 in fp32. In bf16 PEFT computes with LoRA factors in fp32: 0.4 %.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}

STOCK = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

base, ids, *folders = sys.argv[1:]
for folder in folders:
    dtype = getattr(torch, folder.rsplit("-", 1)[1])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), folder + "/adapter")
    with torch.no_grad():
        logits = model.eval()(input_ids=load_file(ids)["input_ids"]).logits
    save_file({"logits": logits.float().contiguous()}, folder + "/stock.safetensors")
assert not any(name.partition(".")[0] in ("orchestrator", "deepspeed") for name in sys.modules)
"""


@dataclass(frozen=True)
class Written:
    """A stage's adapter folder, and what the model computed that it came from."""

    folder: Path
    tensors: dict[str, Tensor]
    logits: Tensor


@pytest.fixture(scope="module")
def input_ids(text_rows: Path) -> Tensor:
    return next(evaluation_batches(PreparedRows.open(text_rows), 4, 0, 1)).input_ids


@pytest.fixture(scope="module")
def origin(base: Path) -> Origin:
    return Origin("attention", "f" * 64, {}, "tiny", base_model_hash(base), tokenizer_hash(base), 3)


@pytest.fixture(scope="module")
def written(base, origin, input_ids, tmp_path_factory) -> dict[tuple[str, str], Written]:
    """By stage and precision."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {}
    for precision, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        earlier: dict[str, Tensor] = {}
        for name, adaptation in STAGES.items():
            earlier = {} if name == "rows" else earlier
            model = trained(base, precision, adaptation, earlier, input_ids)
            earlier = tensors_of(model, adaptation)
            place = folder / f"{name}-{dtype}"
            write_adapter(place / "adapter", earlier, adaptation, origin, base, base)
            found[name, precision] = Written(place / "adapter", earlier, logits_of(model, input_ids))
    return found


@pytest.fixture(scope="module")
def stock_logits(base, written, input_ids, tmp_path_factory) -> dict[tuple[str, str], Tensor]:
    """What transformers and PEFT compute from each folder, where none of our code is imported."""
    ids = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    save_file({"input_ids": input_ids}, ids)
    places = {key: adapter.folder.parent for key, adapter in written.items()}
    command = [sys.executable, "-c", STOCK, str(base), str(ids), *map(str, places.values())]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=ids.parent, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return {key: load_file(place / "stock.safetensors")["logits"] for key, place in places.items()}


def trained(base: Path, precision: str, adaptation: Adaptation, earlier: dict[str, Tensor], ids: Tensor) -> PreTrainedModel:
    """A few steps of plain torch from what the stage before left."""
    model = load_model(base, precision)
    attach(model, adaptation, 7, BASE_TOKENS)
    load_tensors(model, earlier)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    for _ in range(3):
        logits = model(input_ids=ids).logits[:, :-1].float()
        cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def tensors_of(model: PreTrainedModel, adaptation: Adaptation) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    named = {name: parameters[name].detach().clone() for name in adapter_parameters(model, adaptation)}
    return adapter_tensors(named, adaptation, BASE_TOKENS)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits.float()


def expected_shapes(adaptation: Adaptation) -> dict[str, tuple[int, int]]:
    """What PEFT's format calls each tensor, written out."""
    names = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
    shapes = {f"base_model.model.{names[module]}.weight": (VOCABULARY, HIDDEN) for module in adaptation.modules_to_save}
    for module in adaptation.rows_to_save:
        key = f"base_model.model.{names[module]}.token_adapter.trainable_tokens_delta"
        shapes[key] = (VOCABULARY - BASE_TOKENS, HIDDEN)
    for layer in range(LAYERS):
        for target, shape in adaptation.lora.items():
            block = "self_attn" if target in ATTENTION else "mlp"
            stem = f"base_model.model.model.layers.{layer}.{block}.{target}"
            rows, columns = SHAPES[target]
            shapes[f"{stem}.lora_A.weight"] = (shape.rank, columns)
            shapes[f"{stem}.lora_B.weight"] = (rows, shape.rank)
    return shapes


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_stock_peft_computes_what_was_trained(written, stock_logits, base, input_ids, stage, precision):
    logits = written[stage, precision].logits
    difference = (stock_logits[stage, precision] - logits).abs().max() / logits.abs().max()
    assert difference < TOLERANCE[precision]
    learned = (logits_of(load_model(base, precision), input_ids) - logits).abs().max() / logits.abs().max()
    assert learned > 10 * TOLERANCE[precision]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_file_holds_exactly_what_differs_from_the_base(written, stage, precision):
    path = written[stage, precision].folder / WEIGHTS_NAME
    shapes = expected_shapes(STAGES[stage])
    assert {key: tuple(tensor.shape) for key, tensor in load_file(path).items()} == shapes
    header = int.from_bytes(path.read_bytes()[:8], "little")
    bytes_each = {"fp32": 4, "bf16": 2}[precision]
    assert path.stat().st_size == 8 + header + bytes_each * sum(rows * columns for rows, columns in shapes.values())


@pytest.mark.parametrize("stage", STAGES)
def test_the_configuration_says_what_the_file_holds(written, base, stage):
    config = json.loads((written[stage, "fp32"].folder / "adapter_config.json").read_text())
    adaptation = STAGES[stage]
    assert config["base_model_name_or_path"] == str(base)
    assert tuple(config["modules_to_save"] or ()) == adaptation.modules_to_save
    rows = {module: list(range(BASE_TOKENS, VOCABULARY)) for module in adaptation.rows_to_save}
    assert (config["trainable_token_indices"] or {}) == rows
    scales = {name: config["alpha_pattern"].get(name, config["lora_alpha"]) for name in adaptation.lora}
    ranks = {name: config["rank_pattern"].get(name, config["r"]) for name in adaptation.lora}
    assert {name: LoraShape(ranks[name], scales[name]) for name in adaptation.lora} == adaptation.lora
    if adaptation.lora:
        assert set(config["target_modules"]) == set(adaptation.lora)


@pytest.mark.parametrize("stage", STAGES)
def test_training_holds_no_second_copy_of_embedding_and_head(base, stage):
    model = load_model(base, "fp32")
    attach(model, STAGES[stage], 7, BASE_TOKENS)
    assert not any(isinstance(module, ModulesToSaveWrapper) for module in model.modules())
    factors = [shape for key, shape in expected_shapes(STAGES[stage]).items() if "lora_" in key]
    _, total = count_parameters(model)
    assert total == TINY_PARAMETERS + sum(rows * columns for rows, columns in factors)


def test_the_next_stage_goes_on_from_every_tensor(base, written):
    model = load_model(base, "fp32")
    attach(model, STAGES["instruct"], seed=8)
    adapter = written["attention", "fp32"]
    load_tensors(model, read_adapter(adapter.folder, base, base))
    now = tensors_of(model, STAGES["instruct"])
    assert set(adapter.tensors) < set(now)
    assert all(torch.equal(now[key], tensor) for key, tensor in adapter.tensors.items())


def test_rows_that_stay_are_those_of_the_base(base, written):
    table = "base_model.model.model.embed_tokens.weight"
    rows = {name: written[name, "fp32"].tensors for name in ("rows", "rows_and_lora", "whole_after_rows", "rows_of_a_whole")}
    new = table.replace("weight", "token_adapter.trainable_tokens_delta")
    # Frozen in the second stage, learned as a whole in the third, and from there the new ones alone.
    assert torch.equal(rows["rows"][new], rows["rows_and_lora"][new])
    whole, last = rows["whole_after_rows"][table], rows["rows_of_a_whole"][table]
    assert not torch.equal(
        whole[:BASE_TOKENS], load_model(base, "fp32").state_dict()["model.embed_tokens.weight"][:BASE_TOKENS]
    )
    assert torch.equal(whole[:BASE_TOKENS], last[:BASE_TOKENS])
    assert not torch.equal(whole[BASE_TOKENS:], last[BASE_TOKENS:])


def test_a_tensor_that_the_stage_has_not_or_of_another_shape_is_refused(base, written):
    model = load_model(base, "fp32")
    attach(model, STAGES["embeddings"], seed=7)
    with pytest.raises(ModelError, match=r"the adapter holds .*lora_A.weight, which this stage's model has not"):
        load_tensors(model, written["attention", "fp32"].tensors)
    key = "base_model.model.model.embed_tokens.weight"
    with pytest.raises(ModelError, match=r"embed_tokens.weight is \(513, 64\), the model's \(512, 64\)"):
        load_tensors(model, {key: torch.zeros(513, 64)})


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written["attention", "fp32"].folder, tmp_path / "adapter"))


def test_another_base_is_refused_by_name_and_hash(folder, base, another_base):
    given, known = base_model_hash(another_base)[:12], base_model_hash(base)[:12]
    with pytest.raises(ModelError, match=rf"trained on the base tiny \({known}\), not on {another_base} \({given}\)"):
        read_adapter(folder, another_base, base)


def test_another_tokenizer_is_refused_by_name_and_hash(folder, base, tmp_path):
    other = tmp_path / "tokenizer"
    other.mkdir()
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, other / name)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": False}))
    given, known = tokenizer_hash(other)[:12], tokenizer_hash(base)[:12]
    with pytest.raises(ModelError, match=rf"with the tokenizer {known}, not with {other} \({given}\)"):
        read_adapter(folder, base, other)
    assert read_adapter(folder, base, folder).keys() == read_adapter(folder, base, base).keys()


def test_a_flipped_bit_in_the_weights_is_refused(folder, base):
    content = bytearray((folder / WEIGHTS_NAME).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / WEIGHTS_NAME).write_bytes(content)
    with pytest.raises(ModelError, match=f"{WEIGHTS_NAME} is not the file that was written"):
        read_adapter(folder, base, base)


@pytest.mark.parametrize("name", [WEIGHTS_NAME, "adapter_config.json", "tokenizer.model"])
def test_a_missing_file_is_refused(folder, base, name):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing; the manifest lists it"):
        read_adapter(folder, base, base)


def test_a_folder_without_a_manifest_is_refused(folder, base):
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(ModelError, match=f"has no {MANIFEST_NAME}"):
        read_adapter(folder, base, base)


def with_value(key: str, value: float):
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[key] = tensors[key].clone()
        tensors[key][0, 0] = value

    return spoil


HEAD = "base_model.model.lm_head.weight"
FACTOR = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
SPOILED = {
    "all zero": (lambda tensors: tensors.update({FACTOR: torch.zeros_like(tensors[FACTOR])}), rf"{FACTOR} is all zero"),
    "NaN": (with_value(HEAD, float("nan")), rf"{HEAD} has values that are not finite"),
    "infinite": (with_value(HEAD, float("inf")), rf"{HEAD} has values that are not finite"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED.keys())
def test_a_tensor_that_was_not_learned_is_not_kept(written, origin, base, tmp_path, spoil, message):
    tensors = dict(written["attention", "fp32"].tensors)
    spoil(tensors)
    with pytest.raises(TrainingError, match=message):
        write_adapter(tmp_path / "adapter", tensors, STAGES["attention"], origin, base, base)
    assert not (tmp_path / "adapter").exists()


def test_a_file_other_than_what_was_learned_is_seen(written):
    path, tensors = written["attention", "fp32"].folder / WEIGHTS_NAME, written["attention", "fp32"].tensors
    verify_written(path, tensors)
    with pytest.raises(TrainingError, match=r"\['extra'\] too many or too few"):
        verify_written(path, tensors | {"extra": torch.ones(1)})
    with pytest.raises(TrainingError, match=rf"\['{HEAD}'\] too many or too few"):
        verify_written(path, {key: tensor for key, tensor in tensors.items() if key != HEAD})
    with pytest.raises(TrainingError, match=f"{HEAD} reads back other than it was written"):
        verify_written(path, tensors | {HEAD: tensors[HEAD] + 1e-6})
