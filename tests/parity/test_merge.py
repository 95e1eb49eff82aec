"""A merged model computes what base and adapter compute, and touches nothing else."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from orchestrator.checkpoint.adapter import write_adapter
from orchestrator.checkpoint.manifest import Origin, read_manifest, write_manifest
from orchestrator.contents import base_model_hash, tokenizer_hash
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.errors import ModelError, TrainingError
from orchestrator.model.adapters import adapter_parameters, adapter_tensors, attach, read_merge_rule
from orchestrator.model.loading import load_model
from orchestrator.model.merge import write_merged
from orchestrator.plan.adaptation import Adaptation
from orchestrator.plan.targets import LoraShape
from orchestrator.schema import ExportStage
from orchestrator.stages.assignment import ExportAssignment
from orchestrator.stages.export import run_export

ADAPTATION = Adaptation(
    lora={"q_proj": LoraShape(8, 32), "o_proj": LoraShape(8, 32), "down_proj": LoraShape(4, 4)},
    modules_to_save=("embed_tokens",),
    trained_lora=("down_proj",),
    trained_modules=("embed_tokens",),
    rows_to_save=("lm_head",),
)
BASE_TOKENS = 400
"""Of 512 rows of the head those before the ones that the adapter holds."""
ADAPTED = ("q_proj", "o_proj", "down_proj", "embed_tokens", "lm_head")
IDS = torch.arange(96).reshape(2, 48)
SHARDS = pytest.mark.parametrize(("max_shard_bytes", "num_shards"), [(1 << 30, 1), (150_000, 4)])


@dataclass(frozen=True)
class Learned:
    """A base in fp32, and an adapter on it."""

    base: Path
    adapter: Path
    tensors: dict[str, Tensor]


@pytest.fixture(scope="module")
def learned(base, tmp_path_factory) -> Learned:
    folder = tmp_path_factory.mktemp("learned")
    exact = folder / "base"
    shutil.copytree(base, exact)
    load_model(base, "fp32").save_pretrained(exact)
    return Learned(exact, folder / "adapter", random_adapter(exact, folder / "adapter", "fp32"))


def random_adapter(base: Path, folder: Path, precision: str) -> dict[str, Tensor]:
    """An adapter in which every factor, embedding and head matters."""
    model = load_model(base, precision)
    attach(model, ADAPTATION, seed=7)
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(8)
    noisy = {}
    for name in adapter_parameters(model, ADAPTATION):
        noise = torch.randn(parameters[name].shape, generator=generator) * 0.05
        noisy[name] = (parameters[name].detach() + noise.to(parameters[name].dtype)).contiguous()
    tensors = adapter_tensors(noisy, ADAPTATION, BASE_TOKENS)
    write_adapter(folder, tensors, ADAPTATION, origin_on(base), base, base)
    return tensors


def origin_on(base: Path) -> Origin:
    return Origin("instruct", "f" * 64, {}, "tiny", base_model_hash(base), tokenizer_hash(base), 3)


def merge(learned: Learned, folder: Path, max_shard_bytes: int) -> Path:
    folder.mkdir()
    write_merged(learned.base, learned.tensors, read_merge_rule(learned.adapter), folder, max_shard_bytes)
    shutil.copyfile(learned.base / "config.json", folder / "config.json")
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def adapted(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(load_model(base, "fp32"), str(adapter))


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits.float()


@SHARDS
def test_merging_is_pefts_own_merge(learned, tmp_path, max_shard_bytes, num_shards):
    folder = merge(learned, tmp_path / "merged", max_shard_bytes)
    assert len(list(folder.glob("*.safetensors"))) == num_shards
    merged, theirs = weights(folder), adapted(learned.base, learned.adapter).merge_and_unload().state_dict()
    assert merged.keys() == theirs.keys()
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=1e-6)


@SHARDS
def test_a_merged_model_loads_and_computes_what_base_and_adapter_compute(learned, tmp_path, max_shard_bytes, num_shards):
    folder = merge(learned, tmp_path / "merged", max_shard_bytes)
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    expected = logits(adapted(learned.base, learned.adapter))
    assert (logits(model) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (logits(load_model(learned.base, "fp32")) - expected).abs().max() > 0.1 * expected.abs().max()


@SHARDS
def test_layers_without_adapter_stay_to_the_bit(learned, tmp_path, max_shard_bytes, num_shards):
    before, after = weights(learned.base), weights(merge(learned, tmp_path / "merged", max_shard_bytes))
    untouched = [key for key in before if key.split(".")[-2] not in ADAPTED]
    assert len(untouched) == 2 * 6 + 1
    assert all(torch.equal(before[key], after[key]) for key in untouched)
    assert all(not torch.equal(before[key], after[key]) for key in before.keys() - set(untouched))


def test_the_index_names_every_tensor_and_its_shard(learned, tmp_path):
    folder = merge(learned, tmp_path / "merged", 150_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held = {key: path.name for path in folder.glob("*.safetensors") for key in load_file(path)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(folder).values())
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 150_000 or len(tensors) == 1


def test_an_adapter_tensor_without_counterpart_is_an_error(learned, tmp_path):
    key = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
    rule = read_merge_rule(learned.adapter)
    with pytest.raises(ModelError, match=f"the adapter's {key} has no counterpart in the base {learned.base}"):
        write_merged(learned.base, learned.tensors | {key: torch.ones(8, 64)}, rule, tmp_path, 1 << 30)


@pytest.fixture
def assignment(learned, tmp_path) -> ExportAssignment:
    return ExportAssignment(learned.base, learned.base, learned.adapter, tmp_path, "fp32", origin_on(learned.base))


def test_export_leaves_an_adapter_and_a_merged_model_that_load_and_agree(learned, assignment):
    results = run_export(ExportStage(kind="export", max_shard_bytes=150_000), assignment)
    folder = assignment.folder
    expected = logits(adapted(learned.base, learned.adapter))
    exported = logits(adapted(learned.base, folder / "adapter"))
    merged: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    assert torch.equal(exported, expected)
    assert (logits(merged) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert results["merged_logit_difference"] < 1e-5
    for name in ("adapter", "merged"):
        assert results[f"{name}_bytes"] == sum(path.stat().st_size for path in (folder / name).iterdir())
        assert len(load_tokenizer(folder / name)) == 512


def test_export_without_merging_leaves_the_adapter_alone(assignment):
    results = run_export(ExportStage(kind="export", merged=False), assignment)
    assert [path.name for path in assignment.folder.iterdir()] == ["adapter"]
    assert results.keys() == {"adapter_bytes"}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_export_accepts_the_rounding_of_a_base_in_bf16(base, tmp_path, precision):
    random_adapter(base, tmp_path / "learned", precision)
    assignment = ExportAssignment(base, base, tmp_path / "learned", tmp_path / "export", precision, origin_on(base))
    assignment.folder.mkdir()
    run_export(ExportStage(kind="export"), assignment)
    assert {tensor.dtype for tensor in weights(assignment.folder / "merged").values()} == {torch.bfloat16}


@pytest.mark.parametrize("wrong", [{"use_dora": True}, {"lora_alpha": float("inf")}])
def test_export_refuses_a_merged_model_that_computes_otherwise(assignment, tmp_path, wrong):
    # Of directions whose lengths are in no file PEFT makes something else; and a scale can make all logits NaN.
    folder = tmp_path / "wrong"
    shutil.copytree(assignment.adapter, folder)
    description = folder / "adapter_config.json"
    description.write_text(json.dumps(json.loads(description.read_text(encoding="utf-8")) | wrong), encoding="utf-8")
    write_manifest(folder, assignment.origin, read_manifest(folder).tensors)
    with pytest.raises(TrainingError, match="its logits differ from base and adapter by"):
        run_export(ExportStage(kind="export"), replace(assignment, adapter=folder))
