"""Which layers a method adapts, and how, from the names of the model's layers alone."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.errors import RecipeError
from orchestrator.schema import Lora
from orchestrator.schema.methods import ALL_LINEAR

TABLES = ("model.embed_tokens", "lm_head")
"""Outside the blocks; adapted where they are named, and by no pattern."""


@dataclass(frozen=True)
class LoraShape:
    """The factors on one linear layer, or one kind of them: A [rank, in], B [out, rank], scaled by alpha / rank."""

    rank: int
    alpha: int

    @property
    def doubled(self) -> "LoraShape":
        """Two such side by side, with the same scale."""
        return LoraShape(2 * self.rank, 2 * self.alpha)


def lora_shapes(field: str, lora: Lora, layers: Sequence[str]) -> dict[str, LoraShape]:
    """By full name of each layer that is adapted; RecipeError names what of `field` fits no layer.

    `layers` are the full names of the linear layers in the blocks.
    """
    problems: list[str] = []
    chosen = _targets(field, lora, layers, problems)
    kept = _in_blocks(field, lora, chosen, problems)
    if chosen and not kept and not problems:
        problems.append(f"{field}.layers_to_transform: {list(lora.layers_to_transform or ())} leaves none of the targets")
    for name, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        problems += [
            f"{field}.{name}: {key} fits none of the layers that are adapted; {_choose(chosen)}"
            for key in pattern
            if not any(_fits(key, layer) for layer in kept)
        ]
    if problems:
        raise RecipeError(problems)
    return {
        layer: LoraShape(_first_fit(lora.rank_pattern, layer, lora.rank), _first_fit(lora.alpha_pattern, layer, lora.alpha))
        for layer in kept
    }


def named_layers(field: str, names: Iterable[str], layers: Sequence[str], tables: Sequence[str] = ()) -> list[str]:
    """Full names of the layers that end in one of the names; RecipeError names those that none does."""
    found: list[str] = []
    problems = []
    for name in dict.fromkeys(names):
        if fitting := [layer for layer in (*layers, *tables) if ends_in(layer, name)]:
            found += fitting
        else:
            problems.append(f"{field}: {name} names no linear layer of this model; {_choose(layers, tables)}")
    if problems:
        raise RecipeError(problems)
    return list(dict.fromkeys(found))


def ends_in(layer: str, name: str) -> bool:
    """Whether a layer is called so, as PEFT reads a target."""
    return layer == name or layer.endswith(f".{name}")


def shortest(shapes: Mapping[str, LoraShape], layers: Sequence[str]) -> dict[str, LoraShape]:
    """The same by last name where all layers of that name are adapted alike."""
    found: dict[str, LoraShape] = {}
    for layer, shape in shapes.items():
        last = layer.rsplit(".", 1)[-1]
        alike = [other for other in (*layers, *TABLES) if ends_in(other, last)]
        found[last if all(shapes.get(other) == shape for other in alike) else layer] = shape
    return found


def _targets(field: str, lora: Lora, layers: Sequence[str], problems: list[str]) -> list[str]:
    if not isinstance(lora.targets, str):
        try:
            return named_layers(f"{field}.targets", lora.targets, layers, TABLES)
        except RecipeError as error:
            problems += error.problems
            return []
    if lora.targets == ALL_LINEAR:
        return list(layers)
    try:
        found = [layer for layer in layers if re.fullmatch(lora.targets, layer)]
    except re.error as error:
        problems.append(f"{field}.targets: {lora.targets} is no regular expression: {error}")
        return []
    if not found:
        example = layers[0] if layers else "model.layers.0.self_attn.q_proj"
        problems.append(
            f"{field}.targets: {lora.targets} fits the whole name of no linear layer, such as {example}; "
            f"names are given as a list: [{lora.targets}]"
        )
    return found


def _in_blocks(field: str, lora: Lora, chosen: list[str], problems: list[str]) -> list[str]:
    """Those in the blocks that were asked for."""
    if lora.layers_to_transform is None:
        return chosen
    named = rf"\.{re.escape(lora.layers_pattern)}\.(\d+)\." if lora.layers_pattern else r"\.(\d+)\."
    numbers = {layer: int(match[1]) for layer in chosen if (match := re.search(named, layer))}
    if chosen and not numbers:
        problems.append(f"{field}.layers_pattern: {lora.layers_pattern} is in no layer's name, such as {chosen[0]}")
        return []
    count = 1 + max(numbers.values(), default=-1)
    problems += [
        f"{field}.layers_to_transform: there is no block {number}; they are 0 to {count - 1}"
        for number in lora.layers_to_transform
        if chosen and number not in numbers.values()
    ]
    return [layer for layer, number in numbers.items() if number in lora.layers_to_transform]


def _fits(pattern: str, layer: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", layer) is not None


def _first_fit(patterns: Mapping[str, int], layer: str, otherwise: int) -> int:
    return next((value for pattern, value in patterns.items() if _fits(pattern, layer)), otherwise)


def _choose(layers: Sequence[str], tables: Sequence[str] = ()) -> str:
    names = sorted({layer.rsplit(".", 1)[-1] for layer in layers}) + [table.rsplit(".", 1)[-1] for table in tables]
    return f"choose from {', '.join(names)}"
