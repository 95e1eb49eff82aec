"""What a comparison found, as a table and as a plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib as mpl
from matplotlib.figure import Figure

_MET, _MISSED, _LIMIT = "#4878a8", "#c8553d", "#222222"


@dataclass(frozen=True)
class Row:
    """A figure of ours beside the reference's, and what their ratio must be."""

    name: str
    ours: float
    limit: float
    bound: Literal["≥", "≤"]
    reference: float | None = None
    """None where the limit is for the figure itself."""

    @property
    def compared(self) -> float:
        return self.ours if self.reference is None else self.ours / self.reference

    @property
    def is_met(self) -> bool:
        return self.compared >= self.limit if self.bound == "≥" else self.compared <= self.limit


def table(rows: Sequence[Row]) -> str:
    """In Markdown."""
    lines = ["| | reference | ours | ratio | must | |", "|---|---|---|---|---|---|"]
    for row in rows:
        reference, ratio = ("", "") if row.reference is None else (f"{row.reference:,.1f}", f"{row.compared:.2f}")
        ours = f"{row.ours:,.2f}" if row.reference is None else f"{row.ours:,.1f}"
        met = "met" if row.is_met else "**missed**"
        lines.append(f"| {row.name} | {reference} | {ours} | {ratio} | {row.bound} {row.limit:g} | {met} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Ratios as bars, each with its limit; what has no reference is left out."""
    shown = [row for row in rows if row.reference is not None]
    # The same file for the same figures.
    with mpl.rc_context({"svg.hashsalt": "bench", "font.size": 9}):
        figure = Figure(figsize=(8, 0.34 * len(shown) + 0.9), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(shown):
            axes.barh(place, row.compared, color=_MET if row.is_met else _MISSED, height=0.62)
            axes.plot([row.limit] * 2, [place - 0.42, place + 0.42], color=_LIMIT, linewidth=1.6)
            axes.annotate(f"{row.compared:.2f}", (row.compared, place), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(shown)), [f"{row.name}  ({row.bound} {row.limit:g})" for row in shown])
        axes.invert_yaxis()
        axes.axvline(1, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_xlim(0, 1.12 * max(max(row.compared, row.limit) for row in shown))
        axes.set_xlabel("ours / reference; the line is what must be reached")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None})
