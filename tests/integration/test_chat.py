"""Talking to adapters and models as a person does, over a pipe; what comes is what stock tools generate."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.checkpoint.adapter import write_adapter
from orchestrator.checkpoint.manifest import Origin
from orchestrator.contents import TOKENIZER_FILES, base_model_hash, tokenizer_hash
from orchestrator.data.templates import ALPACA_PROMPT
from orchestrator.model.adapters import adapter_parameters, attach, written_tensors
from orchestrator.model.loading import load_model
from orchestrator.plan.adaptation import Adaptation
from orchestrator.plan.record import Record, commit
from orchestrator.plan.targets import LoraShape
from orchestrator.schema import Bottleneck
from tests.shared_data import ROOT, SHARED, needs

pytestmark = [pytest.mark.slow, needs("stories260k")]

BASE = SHARED / "stories260k"
LORA = Adaptation(lora={"q_proj": LoraShape(4, 8), "down_proj": LoraShape(4, 8)}, trained_lora=("q_proj", "down_proj"))
TOKENS = 12
SAID = "Tell me about a cat."


def make(folder: Path, adaptation: Adaptation, seed: int) -> Path:
    """An adapter that says something else than the base, by `seed`."""
    model: Any = load_model(BASE, "fp32")
    attach(model, adaptation, seed)
    known = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: known[name].detach() for name in adapter_parameters(model, adaptation)}
    for tensor in parameters.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    origin = Origin("task", "f" * 64, {}, str(BASE), base_model_hash(BASE), tokenizer_hash(BASE), 3)
    tensors = written_tensors(model, parameters, adaptation, None)
    write_adapter(folder, tensors, adaptation, origin, BASE, BASE)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [make(root / f"{name}-0123456789ab" / "adapter", LORA, seed) for seed, name in enumerate(("poems", "letters"))]


def talk(lines: list[str], *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "chat.py"), *map(str, words)]
    command += ["--temperature", "0", "--max-tokens", str(TOKENS)]
    said = "".join(f"{line}\n" for line in lines)
    return subprocess.run(command, input=said, capture_output=True, text=True, timeout=120, check=False)


def generated(prompt: str, adapter: Path | None = None, base: Path = BASE) -> str:
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter))
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]])
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, pad_token_id=2
    )
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_adapters_answer_in_turns_without_a_reload(adapters: list[Path]) -> None:
    done = talk([SAID, "/use letters", SAID, "/use poems", SAID, "/use nobody", "/quit", SAID], *adapters)
    assert done.returncode == 0, done.stderr
    prompt = ALPACA_PROMPT.format(instruction=SAID)
    poems, letters = (generated(prompt, adapter) for adapter in adapters)
    assert poems != letters
    expected = "\n".join((poems, letters, poems))
    assert " ".join(done.stdout.split()) == " ".join(expected.split())
    # And nothing of what libraries have to say.
    assert [line.strip() for line in done.stderr.splitlines()] == [
        "template alpaca, adapters poems, letters; /quit or Ctrl-D ends",
        "no adapter is called nobody; there are poems, letters",
    ]


def test_a_model_goes_on_with_text(tmp_path: Path) -> None:
    done = talk(["Once upon a time"], BASE, "--template", "plain")
    assert done.returncode == 0, done.stderr
    assert " ".join(done.stdout.split()) == " ".join(generated("Once upon a time").split())


def test_the_template_is_that_of_the_stage(adapters: list[Path], tmp_path: Path) -> None:
    stage = tmp_path / "attention-0123456789ab"
    shutil.copytree(adapters[0], stage / "adapter")
    recipe = {"stages": {"attention": {"kind": "train", "objective": "next_token", "template": "alpaca"}}}
    commit(stage, Record("attention", "train", "f" * 64, {}, {}, recipe, {}, {}))
    done = talk([SAID], stage / "adapter")
    assert "template plain;" in done.stderr
    assert " ".join(done.stdout.split()) == " ".join(generated(SAID, adapters[0]).split())


def test_a_chat_template_holds_all_that_was_said(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in (*TOKENIZER_FILES, "config.json", "model.safetensors"):
        if (BASE / file).is_file():
            shutil.copyfile(BASE / file, model / file)
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    once, twice = talk([SAID, SAID], model), talk([SAID, "/clear", SAID], model)
    assert (once.returncode, twice.returncode) == (0, 0), once.stderr + twice.stderr
    assert "template chat;" in once.stderr
    assert once.stdout != twice.stdout


def test_a_bottleneck_answers_too(tmp_path: Path) -> None:
    folder = make(tmp_path / "adapter", Adaptation(bottleneck=Bottleneck(kind="bottleneck", size=8)), 1)
    done = talk(["Once upon a time"], folder, "--template", "plain")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert " ".join(done.stdout.split()) != " ".join(generated("Once upon a time").split())


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("nowhere",), "nowhere holds no tokenizer"),
        ((BASE, BASE), "is a whole model; several artifacts are adapters of one base"),
        ((BASE, "--template", "chat"), "its tokenizer has no chat template; say --template alpaca"),
    ],
)
def test_what_cannot_be_talked_to_is_named(words: tuple, problem: str) -> None:
    done = talk([], *words)
    assert done.returncode == 2
    assert problem in done.stderr


def test_a_base_that_is_not_there_or_another_one_is_named(adapters: list[Path], tmp_path: Path) -> None:
    done = talk([], adapters[0], "--base", tmp_path / "gone")
    assert (done.returncode, "say where it lies with --base" in done.stderr) == (2, True)
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    done = talk([], adapters[0], "--base", other)
    assert (done.returncode, "was trained on the base" in done.stderr) == (2, True)
