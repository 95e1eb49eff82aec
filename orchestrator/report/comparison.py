"""What a comparison of methods found, as a table."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.report.words import size

HEADINGS = ("method", "learns", "bits per character", "tokens/s", "peak memory", "artifact", "ms per token", "merged")


@dataclass(frozen=True)
class Measured:
    """One method, over its seeds."""

    name: str
    learns: int
    of: int
    """Parameters of the model, with what was added."""
    before: float
    """Held-out bits per character of the model that all of them start from."""
    after: tuple[float, ...]
    tokens_per_second: tuple[float, ...]
    peak_bytes: int
    """Of a worker."""
    artifact_bytes: int
    seconds_per_token: dict[str, float]
    """Of writing: adapted and merged, or plain, where it was measured."""
    base_seconds_per_token: float | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.after)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.after) if len(self.after) > 1 else 0.0


@dataclass(frozen=True)
class Yardstick:
    """What methods are measured by: the gain of one of them over the base."""

    reference: str
    reach: float

    def share(self, each: Measured, measured: Sequence[Measured]) -> float:
        """Of the reference's gain."""
        (reference,) = [other for other in measured if other.name == self.reference]
        return (each.before - each.mean) / (reference.before - reference.mean)

    def verdict(self, measured: Sequence[Measured]) -> str:
        """Which method reaches the share with the fewest parameters."""
        able = [each for each in measured if each.name != self.reference and self.share(each, measured) >= self.reach]
        if not able:
            return f"none reaches {self.reach:.0%} of what {self.reference} gains"
        best = min(able, key=lambda each: each.learns)
        who = f"{best.name} is the smallest that reaches {self.reach:.0%} of what {self.reference} gains"
        return f"d{100 * self.reach:.0f} = {best.learns:,}: {who}"


def headings(yardstick: Yardstick | None = None) -> tuple[str, ...]:
    return (*HEADINGS, f"of {yardstick.reference}'s gain") if yardstick else HEADINGS


def rows(measured: Sequence[Measured], yardstick: Yardstick | None = None) -> list[tuple[str, ...]]:
    """In the order of the headings, the base first."""
    found = _rows(measured)
    if not yardstick:
        return found
    shares = ["", *(f"{yardstick.share(each, measured):.0%}" for each in measured)]
    return [(*row, share) for row, share in zip(found, shares, strict=True)]


def _rows(measured: Sequence[Measured]) -> list[tuple[str, ...]]:
    first = measured[0]
    base = f"{1000 * first.base_seconds_per_token:.1f}" if first.base_seconds_per_token else ""
    found: list[tuple[str, ...]] = [("the base", "", f"{first.before:.3f}", "", "", "", base, "")]
    for each in measured:
        times = each.seconds_per_token
        written = times.get("adapted", times.get("plain"))
        merged = times.get("merged")
        found.append(
            (
                each.name,
                f"{each.learns:,} ({each.learns / each.of:.2%})",
                f"{each.mean:.3f} ± {each.spread:.3f}",
                f"{statistics.fmean(each.tokens_per_second):,.0f}",
                size(each.peak_bytes),
                size(each.artifact_bytes),
                f"{1000 * written:.1f}" if written else "",
                f"{1000 * merged:.1f}" if merged else "cannot be" if times and "plain" not in times else "",
            )
        )
    return found


def table(measured: Sequence[Measured], yardstick: Yardstick | None = None) -> str:
    """In Markdown, with what the yardstick says of it."""
    head = headings(yardstick)
    lines = [head, ("---",) * len(head), *rows(measured, yardstick)]
    verdict = f"\n{yardstick.verdict(measured)}\n" if yardstick else ""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n{verdict}"
