"""What differs from the base after each stage, as far as the recipe alone says it.

Each stage's adapter is cumulative: it holds the LoRA factors of this and earlier stages, and the embedding and head
where any of them trained it: the whole of it, or the rows of the tokens that were added, where no stage trained more.
"""

from dataclasses import dataclass, field

from orchestrator.errors import RecipeError
from orchestrator.schema import Lora, Recipe, TrainStage, VocabularyStage


@dataclass(frozen=True)
class LoraShape:
    """The factors on one kind of linear layer: A [rank, in], B [out, rank], scaled by alpha / rank."""

    rank: int
    alpha: int


@dataclass(frozen=True)
class Adaptation:
    """What an adapter holds, and which part of it the stage trains."""

    lora: dict[str, LoraShape] = field(default_factory=dict)
    """By name of the linear layer, in the order in which the stages added them."""
    modules_to_save: tuple[str, ...] = ()
    trained_lora: tuple[str, ...] = ()
    trained_modules: tuple[str, ...] = ()
    rows_to_save: tuple[str, ...] = ()
    """Modules of which it holds the added rows alone."""
    trained_rows: tuple[str, ...] = ()
    """Modules of which this stage trains the added rows alone."""
    dropout: float = 0.0
    """Of the LoRA that this stage trains."""


def adaptations(recipe: Recipe) -> dict[str, Adaptation]:
    """The adaptation after each training stage, by name; RecipeError where stages contradict each other."""
    found: dict[str, Adaptation] = {}
    before = Adaptation()
    origin: dict[str, str] = {}
    problems: list[str] = []
    adds_tokens = False
    for name, stage in recipe.stages.items():
        if isinstance(stage, VocabularyStage):
            adds_tokens = stage.merge != "none"
        if isinstance(stage, TrainStage):
            problems += _conflicts(name, stage.lora, before, origin)
            if stage.new_rows and not adds_tokens:
                problems.append(
                    f"stages.{name}.new_rows: no stage before it adds tokens; put a vocabulary stage there, "
                    "or train modules_to_save"
                )
            before = found[name] = _after(before, stage)
            origin = {target: origin.get(target, name) for target in before.lora}
    if problems:
        raise RecipeError(problems)
    return found


def _after(before: Adaptation, stage: TrainStage) -> Adaptation:
    lora = stage.lora
    new = {target: LoraShape(lora.rank, lora.alpha) for target in lora.targets} if lora else {}
    saved = tuple(dict.fromkeys(before.modules_to_save + stage.modules_to_save))
    rows = dict.fromkeys(before.rows_to_save + stage.new_rows)
    return Adaptation(
        lora={**before.lora, **new},
        modules_to_save=saved,
        trained_lora=tuple(new),
        trained_modules=stage.modules_to_save,
        rows_to_save=tuple(module for module in rows if module not in saved),
        trained_rows=stage.new_rows,
        dropout=lora.dropout if lora else 0.0,
    )


def _conflicts(name: str, lora: Lora | None, before: Adaptation, origin: dict[str, str]) -> list[str]:
    if lora is None:
        return []
    shape = LoraShape(lora.rank, lora.alpha)
    return [
        f"stages.{name}.lora: {target} was given rank {before.lora[target].rank} and alpha {before.lora[target].alpha} by "
        f"stages.{origin[target]}, and goes on with them; it cannot become rank {shape.rank} and alpha {shape.alpha}"
        for target in lora.targets
        if target in before.lora and before.lora[target] != shape
    ]
