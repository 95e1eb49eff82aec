"""Stages of one name that were run in several ways: in what they differ, and what came of it."""

from collections.abc import Sequence

from orchestrator.report.diff import flat, text_of
from orchestrator.report.story import Story

Variants = tuple[str, list[str], list[str], list[tuple[str, list[str], list[str]]]]
"""A name; the fields that differ; the sets that were measured; and of each stage folder, values and numbers."""


def variants(stories: Sequence[Story]) -> list[Variants]:
    """Of training stages that are done."""
    by_name: dict[str, list[Story]] = {}
    for story in stories:
        if story.kind == "train" and story.finished:
            by_name.setdefault(story.name, []).append(story)
    return [_compared(name, several) for name, several in by_name.items() if len(several) > 1]


def _compared(name: str, stories: Sequence[Story]) -> Variants:
    identities = [dict(flat(story.identity)) for story in stories]
    fields = [
        field
        for field in dict.fromkeys(key for each in identities for key in each)
        if len({text_of(each.get(field)) for each in identities}) > 1
    ]
    texts = list(dict.fromkeys(text for story in stories for text in story.held_out))
    rows = [
        (
            story.folder,
            [text_of(values.get(field)) for field in fields],
            [*(_after(story, text) for text in texts), _speed(story)],
        )
        for story, values in zip(stories, identities, strict=True)
    ]
    return name, fields, texts, rows


def _after(story: Story, text: str) -> str:
    value = story.held_out.get(text, {}).get("after", {}).get("bits_per_character")
    return "" if value is None else f"{value:.3f}"


def _speed(story: Story) -> str:
    speed = story.results.get("tokens_per_second")
    return f"{speed:,.0f}" if speed else ""
