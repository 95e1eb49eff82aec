"""Talking to what was learned: a model, or adapters that share one loaded base."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from orchestrator.checkpoint.inventory import CONFIG_NAME, Described, verify
from orchestrator.checkpoint.manifest import check_belongs
from orchestrator.data.chat import chat_prompt_ids
from orchestrator.data.templates import Manner as Template
from orchestrator.data.templates import prompt_ids
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.errors import ModelError
from orchestrator.model.adapters import load_adapter
from orchestrator.model.adapters.several import SeveralAdapters
from orchestrator.model.loading import load_model
from orchestrator.plan.record import read_record


@dataclass(frozen=True)
class Manner:
    """How an answer is made."""

    max_tokens: int = 256
    temperature: float = 0.7
    """0 takes the likeliest token each time."""
    top_p: float = 0.9
    seed: int = 1


@dataclass
class Conversation:
    """One or several artifacts, of which one answers."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    template: Template
    adapters: SeveralAdapters | None = None
    manner: Manner = Manner()
    turns: list[dict[str, str]] = field(default_factory=list)
    """What was said, for templates that hold more than one turn."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters that can be switched to."""
        return self.adapters.names if self.adapters else ()

    def use(self, name: str) -> None:
        """Lets another adapter answer, from the beginning; ModelError where there is none of that name."""
        if self.adapters is None:
            raise ModelError("there is one artifact alone; name several adapters of one base to switch between them")
        self.model = self.adapters.using(name)
        self.turns.clear()

    @torch.no_grad()
    def answer(self, said: str, stream: bool = True) -> str:
        """The model's answer, which is printed while it is made where `stream` is true."""
        turn = {"role": "user", "content": said}
        ids = torch.tensor([self._ids(turn)], device=self.model.device)
        torch.manual_seed(self.manner.seed + len(self.turns) + 1)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.manner.temperature:
            sampling = {"do_sample": True, "temperature": self.manner.temperature, "top_p": self.manner.top_p}
        given = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.manner.max_tokens,
            pad_token_id=self.tokenizer.eos_token_id,
            streamer=TextStreamer(cast(Any, self.tokenizer), skip_prompt=True, skip_special_tokens=True) if stream else None,
            use_cache=True,
            **sampling,
        )
        text = self.tokenizer.decode(given[0, ids.shape[1] :], skip_special_tokens=True)
        assert isinstance(text, str)
        # Only now: an answer that a person broke off was not given.
        self.turns += [turn, {"role": "assistant", "content": text}]
        return text

    def _ids(self, turn: dict[str, str]) -> list[int]:
        if self.template == "chat":
            return chat_prompt_ids(self.tokenizer, [*self.turns, turn])
        return prompt_ids(self.tokenizer, self.template, turn["content"])


def open_conversation(
    artifacts: Sequence[Path], base: Path | None, template: Template | None, manner: Manner
) -> Conversation:
    """Loads a model's folder, or adapters of one base; `base` is where that lies now, if not where it was.

    ModelError where a folder holds neither, or the adapters do not share base and tokenizer.
    """
    first = artifacts[0]
    tokenizer = load_tokenizer(first)
    template = template or _template_of(first, tokenizer)
    if template == "chat" and tokenizer.chat_template is None:
        raise ModelError(f"{first}: its tokenizer has no chat template; say --template alpaca")
    if not (first / CONFIG_NAME).is_file():
        if len(artifacts) > 1:
            raise ModelError(f"{first} is a whole model; several artifacts are adapters of one base")
        return Conversation(_loaded(first), tokenizer, template, manner=manner)
    found = [verify(folder) for folder in artifacts]
    place = _base_of(found, base)
    if others := [each for each in found if not each.is_peft]:
        if len(found) > 1:
            raise ModelError(f"{others[0].folder}: {others[0].method} cannot be switched; give it alone")
        return Conversation(load_adapter(_loaded(place), first).eval(), tokenizer, template, manner=manner)
    several = SeveralAdapters(_loaded(place))
    for name, each in zip(_names(artifacts), found, strict=True):
        several.load(name, each.folder)
    return Conversation(several.using(several.names[0]), tokenizer, template, several, manner)


def _base_of(found: Sequence[Described], base: Path | None) -> Path:
    place = base or Path(found[0].manifest.origin.base_name)
    if not place.is_dir():
        raise ModelError(f"the base {place} is not there; say where it lies with --base")
    for each in found:
        # All with the first one's tokenizer, which is the one that is spoken through.
        check_belongs(each.folder, each.manifest, place, found[0].folder)
    return place


def _loaded(folder: Path) -> Any:
    on_gpu = torch.cuda.is_available()
    model: Any = load_model(folder, "bf16" if on_gpu else "fp32")
    return model.to("cuda" if on_gpu else "cpu").eval()


def _names(artifacts: Sequence[Path]) -> list[str]:
    """`attention` of runs/attention-0123456789ab/adapter; numbered where two would be called alike."""
    plain = [
        (each.resolve().parent if each.name == "adapter" else each.resolve()).name.partition("-")[0] for each in artifacts
    ]
    # PEFT's names of modules may hold no dots.
    plain = [name.replace(".", "_") for name in plain]
    return [f"{name}_{number}" if plain.count(name) > 1 else name for number, name in enumerate(plain, start=1)]


def _template_of(artifact: Path, tokenizer: PreTrainedTokenizerBase) -> Template:
    """As the stage that left the artifact was trained or, of one that was exported, the last that learned answers."""
    record = read_record(artifact.resolve().parent)
    if record is None:
        return "chat" if tokenizer.chat_template is not None else "alpaca"
    stages = record.recipe["stages"]
    trained = [stage for stage in stages.values() if stage["kind"] == "train"]
    if record.kind == "train":
        trained = [stages[record.stage]]
    answering = [stage for stage in trained if stage["objective"] == "answers"]
    return answering[-1]["template"] if answering else "plain"
