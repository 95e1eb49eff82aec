"""Each method learns the same under every ZeRO level, goes on from another's state, and loads with stock tools alone."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from transformers import LlamaForCausalLM

from orchestrator.checkpoint.adapter import write_adapter
from orchestrator.checkpoint.manifest import Origin
from orchestrator.checkpoint.whole_model import write_whole_model
from orchestrator.contents import TOKENIZER_FILES, base_model_hash, tokenizer_hash
from orchestrator.engine import Engine, EngineSettings
from orchestrator.model.adapters import adapter_parameters, attach, second_factors, weights_of, written_tensors
from orchestrator.model.loading import load_config, load_model
from orchestrator.model.loss import SummedLoss
from orchestrator.plan.adaptation import Adaptation
from orchestrator.plan.targets import LoraShape
from orchestrator.schema import Bottleneck, PrefixTuning, PromptTuning, PTuning, Subspace
from tests.distributed import run_on_ranks
from tests.parity.tiny_run import LEARNING_RATE, Curve, TinyRun, take_steps

pytestmark = pytest.mark.slow

LORA = Adaptation(
    lora={"q_proj": LoraShape(4, 8), "down_proj": LoraShape(2, 8)}, trained_lora=("q_proj", "down_proj"), bias="none"
)
METHODS = {
    "lora on tables": Adaptation(
        lora={"embed_tokens": LoraShape(4, 8), "lm_head": LoraShape(4, 8), "v_proj": LoraShape(4, 8)},
        trained_lora=("embed_tokens", "lm_head", "v_proj"),
    ),
    "lora with biases": replace(LORA, bias="all", trained_bias="all"),
    "lora with its biases": replace(LORA, bias="lora_only", trained_bias="lora_only"),
    "lora in one block": replace(
        LORA,
        lora={"model.layers.1.self_attn.q_proj": LoraShape(4, 8), "model.layers.0.mlp.up_proj": LoraShape(2, 2)},
        trained_lora=("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"),
    ),
    "loraplus": LORA,
    "rslora": replace(LORA, rslora=True),
    "dora": replace(LORA, dora=True),
    "pissa": replace(LORA, init="pissa"),
    "bitfit": Adaptation(bias="all", trained_bias="all"),
    "ia3": Adaptation(ia3=("k_proj", "v_proj", "down_proj"), ia3_feedforward=("down_proj",), trains_ia3=True),
    "bottlenecks": Adaptation(bottleneck=Bottleneck(kind="bottleneck", size=6)),
    "bottlenecks behind the mlp": Adaptation(bottleneck=Bottleneck(kind="bottleneck", placement="pfeiffer", size=6)),
    "full": Adaptation(full=True),
    "subspace": Adaptation(full=True, subspace=Subspace(kind="subspace", dimension=200)),
    "subspace of one projection": Adaptation(
        full=True, subspace=Subspace(kind="subspace", dimension=200, structure_aware=False)
    ),
    "prompt tuning": Adaptation(prompt=PromptTuning(kind="prompt_tuning", virtual_tokens=5)),
    "p-tuning by an mlp": Adaptation(prompt=PTuning(kind="p_tuning", virtual_tokens=5, hidden_size=16)),
    "p-tuning by an lstm": Adaptation(prompt=PTuning(kind="p_tuning", virtual_tokens=5, hidden_size=16, encoder="lstm")),
    "prefix tuning": Adaptation(prompt=PrefixTuning(kind="prefix_tuning", virtual_tokens=5)),
    "prefix tuning through a network": Adaptation(
        prompt=PrefixTuning(kind="prefix_tuning", virtual_tokens=5, projection=16)
    ),
}
BY_PEFT = [name for name, adaptation in METHODS.items() if not adaptation.bottleneck]
"""Or by transformers alone; what AdapterHub's library makes of the others is in test_adapterhub.py."""
FASTER = {"loraplus": 4.0}
LEVELS: tuple[Literal[0, 2, 3], ...] = (0, 2, 3)
# As in the other parity tests.
TOLERANCE = 1e-5
STEPS = 3

STOCK = """
import sys
from pathlib import Path
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

base, ids, *folders = sys.argv[1:]
for folder in map(Path, folders):
    if (folder / "model").is_dir():
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    else:
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder / "adapter")
        )
    with torch.no_grad():
        logits = model.eval()(input_ids=load_file(ids)["input_ids"]).logits
    save_file({"logits": logits.contiguous()}, folder / "stock.safetensors")
assert not any(name.partition(".")[0] in ("orchestrator", "deepspeed") for name in sys.modules)
"""


@dataclass(frozen=True)
class Found:
    curve: Curve
    rest: Curve
    """The same steps from the second on, by an engine of the next ZeRO level that took over the state after the first."""


def engine_of(run: TinyRun, name: str) -> tuple[Engine, SummedLoss]:
    model = load_model(run.base, run.precision)
    attach(model, METHODS[name], 1)
    loss = SummedLoss(model)
    accumulation = run.global_batch_size // (run.micro_batch_size * dist.get_world_size())
    faster = dict.fromkeys(second_factors(loss), FASTER[name]) if name in FASTER else {}
    settings = EngineSettings(run.zero, run.precision, run.micro_batch_size, accumulation, 0.1, 0.7, faster=faster)
    return Engine(loss, settings), loss


def learn(runs: dict[tuple[str, int], TinyRun], folder: Path) -> dict[tuple[str, int], Found]:
    """All ranks call it; rank 0 leaves what was learned under ZeRO-2, and what the model computes then."""
    found = {}
    for (name, zero), run in runs.items():
        levels = [level for each, level in runs if each == name]
        other = runs[name, levels[(levels.index(zero) + 1) % len(levels)]]
        (engine, loss), rank = engine_of(run, name), dist.get_rank()
        frozen = engine.frozen_checksums()
        first = engine.step(run.batches(rank, dist.get_world_size()).of_step(0), LEARNING_RATE, 0, inspect=True)
        state = engine.state(rank == 0).whole()
        curve = [(first.loss, first.gradient_norm), *take_steps(engine, run, 1, STEPS)]
        assert engine.frozen_checksums() == frozen
        heir, _ = engine_of(other, name)
        heir.load_state(state if rank == 0 else None)
        found[name, zero] = Found(curve, take_steps(heir, other, 1, STEPS))
        if zero == 2:
            save(engine, loss, METHODS[name], run, folder / name)
    return found


def save(engine: Engine, loss: SummedLoss, adaptation: Adaptation, run: TinyRun, folder: Path) -> None:
    prefix, base = "model.", run.base
    origin = Origin("task", "f" * 64, {}, "tiny", base_model_hash(base), tokenizer_hash(base), STEPS)
    names = [prefix + x for x in adapter_parameters(loss.model, adaptation)]
    if adaptation.full:
        names = [name for name in engine.layout() if not name.startswith(f"{prefix}subspace.")]
    parameters = {name.removeprefix(prefix): tensor.clone() for name, tensor in engine.parameters(names)}
    if dist.get_rank() > 0:
        return
    folder.mkdir(parents=True)
    if adaptation.full:
        layout = {name.removeprefix(prefix): tensor for name, tensor in engine.layout().items() if name in names}
        write_whole_model(folder / "model", layout, moved(loss, parameters).items(), origin, (base, base))
    else:
        tensors = written_tensors(loss.model, parameters, adaptation, None)
        write_adapter(folder / "adapter", tensors, adaptation, origin, base, base)
    save_file({"logits": ours(loss)}, folder / "ours.safetensors")


@torch.no_grad()
def moved(loss: SummedLoss, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where the coordinates take the weights, if there are any."""
    subspace = getattr(loss.model, "subspace", None)
    return dict(subspace.moved(weights.items())) if subspace else weights


def ids() -> Tensor:
    return torch.arange(48).reshape(2, 24) * 7 % 512


@torch.no_grad()
def ours(loss: SummedLoss) -> Tensor:
    """As the loss computes them."""
    model = loss.model.eval()
    if hasattr(model, "subspace"):
        weights = {name: weight for name, weight in model.named_parameters() if not name.startswith("subspace.")}
        found = functional_call(model, moved(loss, weights), (), {"input_ids": ids()})
        return found.logits.float().contiguous()
    prompts = getattr(model, "prompts", None)
    return model.lm_head(prompts(model.model, ids())).float().contiguous() if prompts else logits_of(model)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model.eval()(input_ids=ids()).logits.float().contiguous()


@pytest.fixture(scope="module")
def biased(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaMA with biases that are not zero, in fp32."""
    folder = tmp_path_factory.mktemp("biased")
    config: Any = load_config(base)
    config.attention_bias, config.mlp_bias, config.initializer_range = True, True, 0.1
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("methods")


@pytest.fixture(scope="module")
def found(biased: Path, text_rows: Path, folder: Path) -> dict[tuple[str, int], Found]:
    tried = [(name, zero) for name in METHODS for zero in LEVELS if fits(name, zero)]
    runs = {(name, zero): TinyRun(biased, text_rows, "fp32", zero=zero) for name, zero in tried}
    return run_on_ranks(learn, 2, runs, folder)


def fits(name: str, zero: int) -> bool:
    # The lengths of DoRA are those of whole weights, and a subspace moves whole ones.
    return not (name.startswith(("dora", "subspace")) and zero == 3)


@pytest.mark.parametrize("zero", LEVELS)
@pytest.mark.parametrize("name", METHODS)
def test_every_level_learns_the_same_and_goes_on_from_anothers_state(found, name: str, zero: int) -> None:
    if not fits(name, zero):
        assert (name, zero) not in found
        return
    losses, norms = zip(*found[name, zero].curve, strict=True)
    expected_losses, expected_norms = zip(*found[name, 0].curve, strict=True)
    assert losses == pytest.approx(expected_losses, abs=TOLERANCE)
    assert norms == pytest.approx(expected_norms, rel=TOLERANCE)
    assert [loss for loss, _ in found[name, zero].rest] == pytest.approx(losses[1:], abs=TOLERANCE)


def test_loraplus_learns_otherwise_than_lora(found) -> None:
    first, plus = found["lora with biases", 0].curve, found["loraplus", 0].curve
    assert first[0][0] == pytest.approx(plus[0][0], abs=TOLERANCE)
    assert abs(first[2][0] - plus[2][0]) > 10 * TOLERANCE


@pytest.fixture(scope="module")
def stock(found, biased: Path, folder: Path) -> dict[str, Tensor]:
    """What transformers and PEFT compute from each folder, where none of our code is imported."""
    save_file({"input_ids": ids()}, folder / "ids.safetensors")
    command = [
        sys.executable,
        "-c",
        STOCK,
        str(biased),
        str(folder / "ids.safetensors"),
        *(str(folder / x) for x in BY_PEFT),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return {name: load_file(folder / name / "stock.safetensors")["logits"] for name in BY_PEFT}


@pytest.mark.parametrize("name", BY_PEFT)
def test_stock_tools_compute_what_was_trained(stock, biased: Path, folder: Path, name: str) -> None:
    ours = load_file(folder / name / "ours.safetensors")["logits"]
    # PEFT returns what virtual embeddings give as well.
    assert (stock[name][:, -ours.shape[1] :] - ours).abs().max() < TOLERANCE * ours.abs().max()
    before = logits_of(load_model(biased, "fp32"))
    assert (before - ours).abs().max() > 100 * TOLERANCE * ours.abs().max()


@pytest.mark.parametrize("name", [name for name, adaptation in METHODS.items() if not adaptation.full])
def test_an_artifact_holds_what_learned_and_nothing_of_the_base(stock, biased: Path, folder: Path, name: str) -> None:
    written = load_file(weights_of(folder / name / "adapter"))
    base = {tuple(tensor.shape): tensor for tensor in load_file(biased / "model.safetensors").values()}
    assert written
    assert not any(torch.equal(tensor, base[tuple(tensor.shape)]) for tensor in written.values() if tensor.shape in base)
    assert sum(tensor.nbytes for tensor in written.values()) < 0.25 * (biased / "model.safetensors").stat().st_size
