"""What a stage's own files say of how it went, as a report tells it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Story:
    """One stage, done or not."""

    folder: str
    """Its name below the run root."""
    name: str
    kind: str
    """train, vocabulary, …; empty where no record says it yet."""
    state: str
    pipeline: str
    fingerprint: str
    parents: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints by stage."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    finished: float = 0.0
    """Seconds since the epoch, 0 where it is not done."""
    rows: Sequence[Mapping[str, Any]] = ()
    """Of its metrics."""
    events: Sequence[Mapping[str, Any]] = ()
    """Of its ledger."""
    evaluations: Sequence[Mapping[str, Any]] = ()

    @property
    def commands(self) -> list[str]:
        """That began or went on with it, in order."""
        return list(dict.fromkeys(event["command"] for event in self.events if event["event"] == "begin"))

    @property
    def history(self) -> Mapping[str, Any]:
        """Attempts, failures and the like; empty where there was nothing to survive."""
        return self.results.get("history", {})

    @property
    def held_out(self) -> Mapping[str, Mapping[str, Any]]:
        """Numbers before and after it, by set."""
        return self.results.get("held_out", {})


def newest_by_name(stories: Sequence[Story]) -> dict[str, Story]:
    """The one of each name that was finished last, in the order in which they were."""
    found: dict[str, Story] = {}
    for story in sorted(stories, key=lambda each: each.finished):
        found.pop(story.name, None)
        found[story.name] = story
    return found
