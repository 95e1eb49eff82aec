"""Bottleneck adapters load with AdapterHub's own library, in a process that has neither PEFT nor anything of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrator.checkpoint.adapter import write_adapter
from orchestrator.checkpoint.inventory import describe, verify
from orchestrator.checkpoint.manifest import Origin
from orchestrator.contents import base_model_hash, tokenizer_hash
from orchestrator.errors import ModelError
from orchestrator.model.adapters import adapter_parameters, attach, load_adapter, written_tensors
from orchestrator.model.loading import load_model
from orchestrator.plan.adaptation import Adaptation
from orchestrator.schema import Bottleneck

pytestmark = pytest.mark.slow

LIBRARY = "adapters==1.3.0"
"""It wants a transformers of its own, older than ours."""
METHODS = {
    "houlsby": Bottleneck(kind="bottleneck", size=6),
    "pfeiffer": Bottleneck(kind="bottleneck", placement="pfeiffer", size=7),
}
STOCK = """
import json, sys
from pathlib import Path
import adapters, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

base, ids, *folders = sys.argv[1:]
for folder in map(Path, folders):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapters.init(model)
    name = model.load_adapter(str(folder / "adapter"), use_safetensors=True, set_active=True)
    with torch.no_grad():
        logits = model.eval()(input_ids=load_file(ids)["input_ids"]).logits
    save_file({"logits": logits.contiguous()}, folder / "stock.safetensors")
assert not any(name.partition(".")[0] in ("orchestrator", "peft") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("adapterhub")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(site), LIBRARY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode:
        pytest.skip(f"{LIBRARY} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return site


def ids() -> Tensor:
    return torch.arange(48).reshape(2, 24) * 7 % 512


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model.eval()(input_ids=ids()).logits.contiguous()


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each method wrote, and what the model computed then."""
    folder = tmp_path_factory.mktemp("bottlenecks")
    for name, method in METHODS.items():
        model, adaptation = load_model(base, "fp32"), Adaptation(bottleneck=method)
        before = logits_of(model)
        attach(model, adaptation, seed=1)
        assert torch.equal(logits_of(model), before)
        known = dict(model.named_parameters())
        parameters = {each: known[each].detach() for each in adapter_parameters(model, adaptation)}
        for tensor in parameters.values():
            tensor.normal_(std=0.3)
        origin = Origin("task", "f" * 64, {}, "tiny", base_model_hash(base), tokenizer_hash(base), 3)
        tensors = written_tensors(model, parameters, adaptation, None)
        write_adapter(folder / name / "adapter", tensors, adaptation, origin, base, base)
        save_file({"logits": logits_of(model), "before": before}, folder / name / "ours.safetensors")
    save_file({"input_ids": ids()}, folder / "ids.safetensors")
    return folder


def ours(folder: Path, name: str, what: str = "logits") -> Tensor:
    return load_file(folder / name / "ours.safetensors")[what]


def test_the_library_computes_what_was_trained(library: Path, base: Path, folder: Path) -> None:
    folders = [str(folder / name) for name in METHODS]
    command = [sys.executable, "-c", STOCK, str(base), str(folder / "ids.safetensors"), *folders]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(library)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for name in METHODS:
        stock = load_file(folder / name / "stock.safetensors")["logits"]
        assert (stock - ours(folder, name)).abs().max() < 1e-5 * stock.abs().max()
        assert (stock - ours(folder, name, "before")).abs().max() > 0.05 * stock.abs().max()


@pytest.mark.parametrize("name", METHODS)
def test_we_load_it_too(base: Path, folder: Path, name: str) -> None:
    model = load_adapter(load_model(base, "fp32"), folder / name / "adapter")
    torch.testing.assert_close(logits_of(model), ours(folder, name))


def test_it_says_what_it_is(folder: Path) -> None:
    said = {name: verify(folder / name / "adapter").method for name in METHODS}
    assert said == {"houlsby": "BOTTLENECK 6 wide behind attention and MLP", "pfeiffer": "BOTTLENECK 7 wide behind MLP"}
    assert list(describe(folder / "houlsby" / "adapter").kinds) == ["attention_adapters", "output_adapters"]


def test_a_description_of_something_else_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"name": "other", "config": {"architecture": "lora"}}))
    with pytest.raises(ModelError, match="describes neither PEFT's adapters nor a bottleneck"):
        load_adapter(load_model(base, "fp32"), tmp_path)
