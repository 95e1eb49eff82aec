"""What differs from the base after each stage, as far as the recipe and the names of the base's layers say it.

Each stage's adapter is cumulative: it holds the LoRA factors of this and earlier stages, and the embedding and head
where any of them trained it: the whole of it, or the rows of the tokens that were added, where no stage trained more.
What cannot be held in one adapter is refused here; after a merge or a full fine-tuning a new one begins.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.errors import RecipeError
from orchestrator.plan.targets import LoraShape, ends_in, lora_shapes, named_layers, shortest
from orchestrator.schema import (
    BEGINS_WITH_WEIGHTS,
    BitFit,
    Bottleneck,
    ExportStage,
    FullFineTuning,
    Ia3,
    Init,
    Lora,
    MergeStage,
    PrefixTuning,
    PromptMethod,
    PromptTuning,
    PTuning,
    Recipe,
    Subspace,
    TrainStage,
    VocabularyStage,
)

Bias = Literal["none", "all", "lora_only"]
_BIASES: tuple[Bias, ...] = ("none", "lora_only", "all")
"""Each with all that those before it have."""
_MERGE = "put a stage of kind merge between them, and it starts from a model that has what was learned"


@dataclass(frozen=True)
class Adaptation:
    """What an adapter holds, and which part of it the stage trains."""

    lora: dict[str, LoraShape] = field(default_factory=dict)
    """By the last name of linear layers that are all adapted alike, or the full name of one, as the stages added them."""
    modules_to_save: tuple[str, ...] = ()
    trained_lora: tuple[str, ...] = ()
    trained_modules: tuple[str, ...] = ()
    rows_to_save: tuple[str, ...] = ()
    """Modules of which it holds the added rows alone."""
    trained_rows: tuple[str, ...] = ()
    """Modules of which this stage trains the added rows alone."""
    dropout: float = 0.0
    """Of the LoRA that this stage trains."""
    rslora: bool = False
    dora: bool = False
    init: Init = "kaiming"
    """Of the factors that begin in this stage."""
    bias: Bias = "none"
    trained_bias: Bias = "none"
    ia3: tuple[str, ...] = ()
    """Last names of the layers that are scaled; it has no LoRA then."""
    ia3_feedforward: tuple[str, ...] = ()
    trains_ia3: bool = False
    full: bool = False
    """Every weight learns: it holds nothing beside the base, being a base itself."""
    subspace: Subspace | None = None
    """Within which every weight learns then."""

    prompt: PromptMethod | None = None
    """Virtual tokens; it holds nothing else then."""
    bottleneck: Bottleneck | None = None
    """Networks behind the parts of each block; it holds nothing else then."""

    @property
    def can_merge(self) -> bool:
        """Whether a model without an adapter can compute the same."""
        return self.prompt is None and self.bottleneck is None

    @property
    def written_lora(self) -> dict[str, LoraShape]:
        """Those of the adapter that is written: what was taken out of a weight needs as many factors again."""
        begun = self.trained_lora if self.init in BEGINS_WITH_WEIGHTS else ()
        return {name: shape.doubled if name in begun else shape for name, shape in self.lora.items()}


@dataclass(frozen=True)
class _Chain:
    """What the training stages since the last base add up to."""

    adaptation: Adaptation = Adaptation()
    shapes: dict[str, LoraShape] = field(default_factory=dict)
    """By full name."""
    origins: dict[str, str] = field(default_factory=dict)
    """The stage that gave each layer its factors."""
    last: str = ""
    """The stage before."""


def adaptations(recipe: Recipe, layers: Sequence[str]) -> dict[str, Adaptation]:
    """The adaptation after each training stage, by name; RecipeError where stages contradict each other or the model.

    `layers` are the full names of the linear layers in the base's blocks.
    """
    found: dict[str, Adaptation] = {}
    chain = _Chain()
    problems: list[str] = []
    adds_tokens = False
    for name, stage in recipe.stages.items():
        match stage:
            case VocabularyStage():
                adds_tokens = stage.merge != "none"
            case MergeStage():
                problems += _cannot_merge(chain, name)
                chain = _Chain()
            case ExportStage(merged=True):
                problems += _cannot_merge(chain, f"{name}.merged")
            case TrainStage():
                if stage.new_rows and not adds_tokens:
                    problems.append(
                        f"stages.{name}.new_rows: no stage before it adds tokens; put a vocabulary stage there, "
                        "or train modules_to_save"
                    )
                try:
                    chain = _after(chain, name, stage, layers)
                except RecipeError as error:
                    problems += error.problems
                    continue
                found[name] = chain.adaptation
                if chain.adaptation.full:
                    chain = _Chain()
    if problems:
        raise RecipeError(problems)
    return found


def _cannot_merge(chain: _Chain, where: str) -> list[str]:
    remedy = "" if "." not in where else f"; set stages.{where}=false"
    if prompt := chain.adaptation.prompt:
        return [
            f"stages.{where}: the {prompt.kind} of stages.{chain.last} is told to a model and is in none of its "
            f"weights{remedy}"
        ]
    if chain.adaptation.bottleneck:
        return [f"stages.{where}: the bottleneck of stages.{chain.last} is not linear, and no weight can hold it{remedy}"]
    return []


def _after(chain: _Chain, name: str, stage: TrainStage, layers: Sequence[str]) -> _Chain:
    before = chain.adaptation
    if problem := _cannot_follow(chain, name, stage):
        raise RecipeError(problem)
    saved = tuple(dict.fromkeys(before.modules_to_save + stage.modules_to_save))
    rows = dict.fromkeys(before.rows_to_save + stage.new_rows)
    common = {
        "modules_to_save": saved,
        "trained_modules": stage.modules_to_save,
        "rows_to_save": tuple(module for module in rows if module not in saved),
        "trained_rows": stage.new_rows,
    }
    own: dict[str, LoraShape] = {}
    match stage.method:
        case FullFineTuning():
            return _Chain(Adaptation(full=True), last=name)
        case Subspace() as subspace:
            return _Chain(Adaptation(full=True, subspace=subspace), last=name)
        case Ia3() as ia3:
            named_layers(f"stages.{name}.method.targets", ia3.targets, layers)
            scaled = {"ia3": ia3.targets, "ia3_feedforward": ia3.feedforward, "trains_ia3": True}
            return _Chain(Adaptation(**common, **scaled), last=name)
        case (PromptTuning() | PTuning() | PrefixTuning()) as prompt:
            return _Chain(Adaptation(prompt=prompt), last=name)
        case Bottleneck() as bottleneck:
            return _Chain(Adaptation(bottleneck=bottleneck), last=name)
        case Lora() as lora:
            own = lora_shapes(f"stages.{name}.method", lora, layers)
            options: dict[str, Any] = {option: getattr(lora, option) for option in ("rslora", "dora", "init", "dropout")}
            trained_bias: Bias = lora.bias
        case method:
            options = {"rslora": before.rslora, "dora": before.dora}
            trained_bias = "all" if isinstance(method, BitFit) else "none"
    _check_layers(name, own, chain, (*saved, *rows), options.get("init"))
    shapes = chain.shapes | own
    adaptation = Adaptation(
        lora=shortest(shapes, layers),
        trained_lora=tuple(shortest(own, layers)),
        bias=max(before.bias, trained_bias, key=_BIASES.index),
        trained_bias=trained_bias,
        ia3=before.ia3,
        ia3_feedforward=before.ia3_feedforward,
        **common,
        **options,
    )
    if adaptation.init in BEGINS_WITH_WEIGHTS:
        # What was taken out of the weights is put back by factors of their own.
        shapes |= {layer: shape.doubled for layer, shape in own.items()}
    return _Chain(adaptation, shapes, {layer: chain.origins.get(layer, name) for layer in shapes}, name)


def _cannot_follow(chain: _Chain, name: str, stage: TrainStage) -> str:
    """Why one adapter could not hold both what was learned before and what this stage learns; nothing where it can."""
    before, method = chain.adaptation, stage.method
    here, there = f"stages.{name}.method", f"stages.{chain.last}"
    if not chain.last:
        return ""
    if before.prompt:
        return f"stages.{name}: nothing can follow the {before.prompt.kind} of {there}, which is in none of the weights"
    if before.bottleneck and before.bottleneck != method:
        return f"stages.{name}: nothing but the same can follow the bottleneck of {there}, which no weight can hold"
    if method is None or before.bottleneck:
        return ""
    match method:
        case FullFineTuning() | Subspace():
            return f"{here}: {method.kind} trains the base itself, beside which {there} left an adapter; {_MERGE}"
        case Bottleneck() | PromptTuning() | PTuning() | PrefixTuning():
            return f"{here}: {method.kind} has an adapter of its own, and {there} left another; {_MERGE}"
        case Ia3() if (before.ia3, before.ia3_feedforward) != (method.targets, method.feedforward):
            return f"{here}: ia3 has an adapter of its own, and {there} left another; {_MERGE}"
    if before.ia3 and not isinstance(method, Ia3):
        return f"{here}: {method.kind} cannot share an adapter with the ia3 of {there}; {_MERGE}"
    if isinstance(method, Lora) and before.lora:
        for option in ("dora", "rslora"):
            if getattr(before, option) != getattr(method, option):
                has, lacks = ("this stage", there) if getattr(method, option) else (there, "this stage")
                return f"{here}.{option}: {has} has it and {lacks} has not, which one adapter cannot hold; {_MERGE}"
    return ""


def _check_layers(name: str, own: dict[str, LoraShape], chain: _Chain, saved: Sequence[str], init: Init | None) -> None:
    """RecipeError for layers that go on with other factors, have some where they should begin, or learn as a whole, too."""
    conflicts: dict[tuple[str, str, LoraShape, LoraShape], None] = {}
    for layer, shape in own.items():
        if layer in chain.shapes and chain.shapes[layer] != shape:
            conflicts[layer.rsplit(".", 1)[-1], chain.origins[layer], chain.shapes[layer], shape] = None
    problems = [
        f"stages.{name}.method: {target} was given rank {first.rank} and alpha {first.alpha} by stages.{origin}, and goes "
        f"on with them; it cannot become rank {second.rank} and alpha {second.alpha}"
        for target, origin, first, second in conflicts
    ]
    if init in BEGINS_WITH_WEIGHTS and (earlier := {chain.origins[layer] for layer in own if layer in chain.shapes}):
        origin = f"stages.{min(earlier)}"
        problems.append(
            f"stages.{name}.method.init: {init} begins with the weights alone, and {origin} adapted them; {_MERGE}"
        )
    problems += [
        f"stages.{name}: {module} has low-rank factors and cannot be trained as a whole beside them; choose one"
        for module in dict.fromkeys(saved)
        if any(ends_in(layer, module) for layer in (*own, *chain.shapes))
    ]
    if problems:
        raise RecipeError(problems)
