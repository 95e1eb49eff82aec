"""How two runs differ: what was asked for, what came out, and what it was computed with, stage by stage."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.report.story import Story, newest_by_name

_COMPARED = (
    "steps",
    "kept_step",
    "tokens",
    "trainable",
    "tokens_per_second",
    "peak_memory_bytes",
    "seconds",
    "workers",
    "zero",
)


@dataclass(frozen=True)
class StageDifference:
    """Of the stages of one name."""

    name: str
    first: Story | None
    second: Story | None
    asked: list[tuple[str, str, str]]
    """Fields of the identity with their two values."""
    results: list[tuple[str, str, str]]
    environment: list[tuple[str, str, str]]

    @property
    def is_same(self) -> bool:
        """Whether it is one stage, with one result."""
        return bool(self.first and self.second and self.first.fingerprint == self.second.fingerprint)


def differences(first: Sequence[Story], second: Sequence[Story]) -> list[StageDifference]:
    """The newest of each name against each other."""
    one, other = newest_by_name(first), newest_by_name(second)
    return [_difference(name, one.get(name), other.get(name)) for name in dict.fromkeys((*one, *other))]


def _difference(name: str, first: Story | None, second: Story | None) -> StageDifference:
    if not first or not second:
        return StageDifference(name, first, second, [], [], [])
    numbers = [dict(_numbers(story)) for story in (first, second)]
    return StageDifference(
        name,
        first,
        second,
        _unlike(dict(flat(first.identity)), dict(flat(second.identity))),
        _unlike(*numbers),
        _unlike(first.environment, second.environment),
    )


def _unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    names = dict.fromkeys((*first, *second))
    return [
        (name, text_of(first.get(name)), text_of(second.get(name))) for name in names if first.get(name) != second.get(name)
    ]


def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """An identity's fields by dotted path; those of the stage itself as a recipe has them."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}".removeprefix("stage."), inner


def _numbers(story: Story) -> Iterator[tuple[str, Any]]:
    yield from ((name, story.results[name]) for name in _COMPARED if name in story.results)
    if story.rows:
        yield "last loss", story.rows[-1].get("loss")
    for text, values in story.held_out.items():
        yield f"{text}: bits per character after", values["after"]["bits_per_character"]


def text_of(value: Any) -> str:
    """Hashes are cut short, and what is not there is a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    if isinstance(value, list | tuple):
        return ", ".join(map(text_of, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
