"""A base in a few bits: every ZeRO level learns the same on it, and what is learned loads with stock tools."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrator.checkpoint.adapter import write_adapter
from orchestrator.checkpoint.manifest import Origin
from orchestrator.contents import base_model_hash, tokenizer_hash
from orchestrator.data.batches import evaluation_batches
from orchestrator.data.rows import PreparedRows
from orchestrator.engine import Engine, EngineSettings
from orchestrator.model.adapters import adapter_parameters, attach, count_parameters, written_tensors
from orchestrator.model.loading import load_model
from orchestrator.model.loss import SummedLoss
from orchestrator.plan.adaptation import Adaptation
from orchestrator.plan.targets import LoraShape
from orchestrator.schema import Quantization
from tests.distributed import run_on_ranks
from tests.parity.tiny_run import LEARNING_RATE, Curve, TinyRun, take_steps

pytestmark = pytest.mark.slow

LORA = Adaptation(
    lora={"q_proj": LoraShape(4, 8), "down_proj": LoraShape(4, 8)},
    trained_lora=("q_proj", "down_proj"),
    modules_to_save=("lm_head",),
    trained_modules=("lm_head",),
)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LOFTQ = "nf4 with loftq"
BASES: dict[str, tuple[Quantization, Adaptation]] = {
    "nf4": (Quantization(kind="nf4"), LORA),
    "nf4, scales as they are": (Quantization(kind="nf4", double=False), LORA),
    "fp4": (Quantization(kind="fp4"), LORA),
    "int8": (Quantization(kind="int8"), LORA),
    LOFTQ: (Quantization(kind="nf4"), replace(LORA, init="loftq")),
    "nf4 with dora": (Quantization(kind="nf4"), replace(LORA, dora=True)),
}
LEVELS: tuple[Literal[0, 1, 2], ...] = (0, 1, 2)
STEPS = 3
# In bf16 levels add up in another order: as in the other parity tests.
TOLERANCE = 2e-3

STOCK = """
import sys
from pathlib import Path
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

base, ids, *folders = sys.argv[1:]
for folder in map(Path, folders):
    kind = folder.name.split(",")[0].split()[0]
    bits = BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant="," not in folder.name)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=bits, device_map={"": "cpu"})
    # On CPUs with bf16 instructions bitsandbytes lays weights out anew at their first use, and PEFT 0.21 takes DoRA's
    # norms of what is no matrix any more.
    for module in model.modules():
        if "dora" in folder.name and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(model, str(folder / "adapter"))
    with torch.no_grad():
        logits = model.eval()(input_ids=load_file(ids)["input_ids"]).logits
    save_file({"logits": logits.float().contiguous()}, folder / "stock.safetensors")
assert not any(name.partition(".")[0] in ("orchestrator", "deepspeed") for name in sys.modules)
"""


@dataclass(frozen=True)
class Found:
    curve: Curve
    rest: Curve
    """The same steps from the second on, by an engine of the next ZeRO level that took over the state after the first."""


def engine_of(run: TinyRun, name: str) -> tuple[Engine, SummedLoss]:
    quantization, adaptation = BASES[name]
    model = load_model(run.base, run.precision, quantization)
    attach(model, adaptation, 1, base=run.base)
    loss = SummedLoss(model)
    accumulation = run.global_batch_size // (run.micro_batch_size * dist.get_world_size())
    return Engine(loss, EngineSettings(run.zero, run.precision, run.micro_batch_size, accumulation, 0.1, 0.7)), loss


def learn(runs: dict[tuple[str, int], TinyRun], folder: Path) -> dict[tuple[str, int], Found]:
    found = {}
    for (name, zero), run in runs.items():
        (engine, loss), rank = engine_of(run, name), dist.get_rank()
        frozen = engine.frozen_checksums()
        first = engine.step(run.batches(rank, dist.get_world_size()).of_step(0), LEARNING_RATE, 0, inspect=True)
        state = engine.state(rank == 0).whole()
        curve = [(first.loss, first.gradient_norm), *take_steps(engine, run, 1, STEPS)]
        engine.evaluate(evaluation_batches(PreparedRows.open(run.rows), 4, rank, dist.get_world_size()))
        assert engine.frozen_checksums() == frozen
        other = runs[name, (zero + 1) % len(LEVELS)]
        heir, _ = engine_of(other, name)
        heir.load_state(state if rank == 0 else None)
        found[name, zero] = Found(curve, take_steps(heir, other, 1, STEPS))
        if zero == 2:
            save(engine, loss, BASES[name][1], run.base, folder / name)
    return found


def save(engine: Engine, loss: SummedLoss, adaptation: Adaptation, base: Path, folder: Path) -> None:
    names = [f"model.{name}" for name in adapter_parameters(loss.model, adaptation)]
    parameters = {name.removeprefix("model."): tensor.clone() for name, tensor in engine.parameters(names)}
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
        origin = Origin("task", "f" * 64, {}, "tiny", base_model_hash(base), tokenizer_hash(base), STEPS)
        tensors = written_tensors(loss.model, parameters, adaptation, None)
        write_adapter(folder / "adapter", tensors, adaptation, origin, base, base)
        save_file({"logits": logits_of(loss.model)}, folder / "ours.safetensors")


def ids() -> Tensor:
    return torch.arange(48).reshape(2, 24) * 7 % 512


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model.eval()(input_ids=ids()).logits.float().contiguous()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture(scope="module")
def found(base: Path, text_rows: Path, folder: Path) -> dict[tuple[str, int], Found]:
    runs = {(name, zero): TinyRun(base, text_rows, "bf16", zero=zero) for name in BASES for zero in LEVELS}
    return run_on_ranks(learn, 2, runs, folder)


@pytest.mark.parametrize("zero", LEVELS)
@pytest.mark.parametrize("name", BASES)
def test_every_level_learns_the_same_and_goes_on_from_anothers_state(found, name: str, zero: int) -> None:
    losses, _ = zip(*found[name, zero].curve, strict=True)
    assert losses == pytest.approx([loss for loss, _ in found[name, 0].curve], abs=TOLERANCE)
    assert [loss for loss, _ in found[name, zero].rest] == pytest.approx(losses[1:], abs=TOLERANCE)


def test_stock_tools_compute_what_was_trained(found, base: Path, folder: Path) -> None:
    save_file({"input_ids": ids()}, folder / "ids.safetensors")
    folders = [str(folder / name) for name in BASES if name != LOFTQ]
    command = [sys.executable, "-c", STOCK, str(base), str(folder / "ids.safetensors"), *folders]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for name in BASES.keys() - {LOFTQ}:
        stock, ours = (load_file(folder / name / f"{who}.safetensors")["logits"] for who in ("stock", "ours"))
        # PEFT computes with factors in fp32.
        assert (stock - ours).abs().max() < 1e-2 * ours.abs().max(), name


def test_loftq_begins_with_what_quantization_took(base: Path) -> None:
    whole, quantized, model = (load_model(base, "fp32", bits) for bits in (None, *[BASES[LOFTQ][0]] * 2))
    adaptation = Adaptation({name: LoraShape(16, 32) for name in LINEAR}, trained_lora=LINEAR, init="loftq")
    attach(model, adaptation, 1, base=base)
    for number, block in enumerate(model.model.layers):
        layer = block.self_attn.q_proj
        taken = whole.model.layers[number].self_attn.q_proj.weight - dequantize_4bit(
            layer.base_layer.weight, layer.base_layer.weight.quant_state
        )
        begun = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        left, values, right = torch.linalg.svd(taken)
        torch.testing.assert_close(begun, left[:, :16] * values[:16] @ right[:16], atol=1e-6, rtol=1e-4)
    errors = [(logits_of(each) - logits_of(whole)).norm() for each in (quantized, model)]
    assert errors[1] < 0.9 * errors[0]
    # On the base as it is on disk nothing needs to be made up for.
    parameters = {name: dict(model.named_parameters())[name].detach() for name in adapter_parameters(model, adaptation)}
    tensors = written_tensors(model, parameters, adaptation, None)
    for layer in {key.partition(".lora_")[0] for key in tensors}:
        first, second = (tensors[f"{layer}.lora_{factor}.weight"] for factor in "AB")
        assert (second @ first).abs().max() < 1e-6


@pytest.mark.parametrize("name", BASES)
def test_the_blocks_alone_are_in_few_bits_and_are_counted_as_what_they_stand_for(base: Path, name: str) -> None:
    model = load_model(base, "bf16", BASES[name][0])
    few = {each.rsplit(".", 2)[-2] for each, weight in model.named_parameters() if weight.dtype in (torch.uint8, torch.int8)}
    assert few == set(LINEAR)
    whole = load_model(base, "bf16")
    assert count_parameters(model) == (count_parameters(whole)[0] - _in_blocks(whole), count_parameters(whole)[1])
    stored = sum(weight.nbytes for weight in model.model.layers.parameters() if weight.dim() == 2)
    assert stored == _in_blocks(whole) * (1 if name == "int8" else 0.5)


def _in_blocks(model: Any) -> int:
    return sum(weight.numel() for weight in model.model.layers.parameters() if weight.dim() == 2)
