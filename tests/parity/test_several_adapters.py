"""Adapters of several tasks: on one base without a reload, combined, listed, inspected and verified."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrator.checkpoint.adapter import write_adapter
from orchestrator.checkpoint.combined import combine
from orchestrator.checkpoint.inventory import find_adapters
from orchestrator.checkpoint.manifest import Origin, read_manifest, write_manifest
from orchestrator.contents import base_model_hash, tokenizer_hash
from orchestrator.errors import ModelError
from orchestrator.model.adapters import adapter_parameters, attach, layer_ranks, read_merge_rule, written_tensors
from orchestrator.model.adapters.several import SeveralAdapters
from orchestrator.model.loading import load_model
from orchestrator.plan.adaptation import Adaptation
from orchestrator.plan.targets import LoraShape
from tests.shared_data import ROOT

pytestmark = pytest.mark.slow

LORA = Adaptation(lora={"q_proj": LoraShape(4, 8), "up_proj": LoraShape(4, 8)}, trained_lora=("q_proj", "up_proj"))
OTHER_RANK = Adaptation(lora={"q_proj": LoraShape(2, 8)}, trained_lora=("q_proj",))
IDS = torch.arange(40).reshape(2, 20)


def write(base: Path, folder: Path, adaptation: Adaptation, seed: int) -> Path:
    model = load_model(base, "fp32")
    attach(model, adaptation, seed)
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    named = {
        name: parameters[name].detach() + 0.1 * torch.randn(parameters[name].shape, generator=generator)
        for name in adapter_parameters(model, adaptation)
    }
    origin = Origin(
        folder.name, f"{seed}" * 64, {"embeddings": "e" * 64}, str(base), base_model_hash(base), tokenizer_hash(base), 3
    )
    write_adapter(folder, written_tensors(model, named, adaptation, None), adaptation, origin, base, base)
    return folder


@pytest.fixture(scope="module")
def root(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("several")
    for seed, (name, adaptation) in enumerate({"poems": LORA, "letters": LORA, "small": OTHER_RANK}.items(), start=1):
        write(base, root / name, adaptation, seed)
    return root


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def alone(base: Path, folder: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(load_model(base, "fp32"), str(folder)))


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "adapters.py"), *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"COLUMNS": "200"}
    )


def test_adapters_are_switched_on_one_base(base: Path, root: Path) -> None:
    several = SeveralAdapters(load_model(base, "fp32"))
    for name in ("poems", "letters", "small"):
        several.load(name, root / name)
    for name in ("small", "poems", "letters", "poems"):
        assert torch.equal(logits(several.using(name)), alone(base, root / name)), name
    with pytest.raises(ModelError, match="no adapter is called prose; there are poems, letters, small"):
        several.using("prose")


def update(folder: Path) -> dict[str, Tensor]:
    """(alpha / rank) B A of each layer."""
    tensors, rule = load_file(folder / "adapter_model.safetensors"), read_merge_rule(folder)
    found = {}
    for key, first in tensors.items():
        if key.endswith("lora_A.weight"):
            second = tensors[key.replace("lora_A", "lora_B")]
            found[key] = second @ first * rule.scale(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
    return found


def test_svd_gives_the_weighted_sum_as_far_as_the_rank_goes(base: Path, root: Path, tmp_path: Path) -> None:
    combine({root / "poems": 0.7, root / "letters": 0.3}, "cat", None, tmp_path / "cat")
    first, second, both = (update(folder) for folder in (root / "poems", root / "letters", tmp_path / "cat"))
    for key, tensor in both.items():
        torch.testing.assert_close(tensor, 0.7 * first[key] + 0.3 * second[key], rtol=1e-4, atol=1e-5)
    combine({root / "poems": 0.7, root / "letters": 0.3}, "svd", None, tmp_path / "svd")
    for key, tensor in update(tmp_path / "svd").items():
        rest = torch.linalg.svdvals(both[key])[4:].norm()
        assert (tensor - both[key]).norm() == pytest.approx(rest.item(), rel=1e-3)


@pytest.mark.parametrize("how", ["linear", "ties", "dare_linear"])
def test_what_is_combined_is_an_adapter_of_its_own(base: Path, root: Path, tmp_path: Path, how: str) -> None:
    density = ["--density", "0.5"] if how != "linear" else []
    words = ["combine", "--out", tmp_path / "new", "--how", how, *density, f"{root}/poems=0.7", f"{root}/letters=0.3"]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    found = logits(PeftModel.from_pretrained(load_model(base, "fp32"), str(tmp_path / "new")))
    assert not torch.allclose(found, alone(base, root / "poems"), atol=1e-3)
    assert not torch.allclose(found, logits(load_model(base, "fp32")), atol=1e-3)
    assert run("verify", tmp_path / "new", "--base", base).returncode == 0
    origin = read_manifest(tmp_path / "new").origin
    assert origin.parents == {"poems_0": "1" * 64, "letters_1": "2" * 64}
    assert run(*words).stderr.startswith(f"{tmp_path / 'new'} is there already")


def test_what_does_not_go_together_is_refused(base: Path, another_base: Path, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be combined by linear"):
        combine({root / "poems": 1.0, root / "small": 1.0}, "linear", None, tmp_path / "new")
    write(another_base, tmp_path / "elsewhere", LORA, 1)
    with pytest.raises(ModelError, match="were trained on different bases"):
        combine({root / "poems": 1.0, tmp_path / "elsewhere": 1.0}, "linear", None, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_listing_and_inspecting_say_what_an_adapter_is(base: Path, root: Path) -> None:
    assert [found.folder.name for found in find_adapters(root)] == ["letters", "poems", "small"]
    listed = run("list", root).stdout
    assert listed.count("LORA r4 on q_proj, up_proj") == 2
    said = run("inspect", root / "poems").stdout
    for words in (base_model_hash(base)[:12], tokenizer_hash(base)[:12], "poems (111111111111), step 3", "embeddings (eeee"):
        assert words in said
    # A [4, 64] and B [64, 4] in two blocks.
    assert ["q_proj", "4", f"{2 * 2 * 4 * 64:,}"] in [line.split() for line in said.splitlines()]
    assert run("inspect", base).stderr.startswith(f"{base} has no adapter_config.json")


def test_verifying_finds_what_was_changed(root: Path, another_base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "poems", tmp_path / "poems"))
    assert run("verify", folder).returncode == 0
    assert "not on" in run("verify", folder, "--base", another_base).stderr
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[min(tensors)] = torch.zeros_like(tensors[min(tensors)])
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    assert "is not the file that was written" in run("verify", folder).stderr
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.origin, manifest.tensors)
    assert "is all zero" in run("verify", folder).stderr


def test_ranks_are_shown_and_drawn(root: Path, tmp_path: Path) -> None:
    done = run("ranks", root / "poems", "--plot", tmp_path / "ranks.svg")
    assert done.returncode == 0, done.stderr
    found = layer_ranks(load_file(root / "poems" / "adapter_model.safetensors"), read_merge_rule(root / "poems"))
    assert len(found) == 4
    for each in found:
        assert f"{each.layer}" in done.stdout
        assert 1 < each.effective_rank <= 4
    assert (tmp_path / "ranks.svg").read_text(encoding="utf-8").count("<path") > 10
    assert json.loads((root / "poems" / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 4
