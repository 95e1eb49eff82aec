"""Pictures of numbers. Only what draws imports this: matplotlib takes a moment."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from orchestrator.report.comparison import Measured, Yardstick

_BLUE = "#4878a8"
_NEAR = 2.5
"""Labels of points whose parameters differ by less could touch."""


def plot_comparison(measured: Sequence[Measured], path: Path, yardstick: Yardstick | None = None) -> None:
    """Held-out bits per character over what learns; bars are a standard deviation up and down."""
    # The same file for the same figures.
    with mpl.rc_context({"svg.hashsalt": "comparison", "font.size": 9}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for each in measured:
            axes.errorbar(each.learns, each.mean, yerr=each.spread, fmt="o", color=_BLUE, capsize=3, markersize=5)
        for each, height in _label_heights(measured):
            line = {"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6, "shrinkB": 4}
            place = (1.12 * each.learns, height)
            axes.annotate(each.name, (each.learns, each.mean), place, va="center", arrowprops=line)
        levels = {"the base": measured[0].before}
        if yardstick:
            (reference,) = [each for each in measured if each.name == yardstick.reference]
            reached = reference.before - yardstick.reach * (reference.before - reference.mean)
            levels[f"{yardstick.reach:.0%} of what {yardstick.reference} gains"] = reached
        for text, level in levels.items():
            axes.axhline(level, color="#999999", linewidth=0.8, linestyle=":")
            axes.annotate(text, (0, level), (4, 3), xycoords=("axes fraction", "data"), textcoords="offset points")
        axes.set_xscale("log")
        axes.margins(x=0.15, y=0.12)
        axes.set_xlabel("parameters that learn")
        axes.set_ylabel("held-out bits per character")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None})


def _label_heights(measured: Sequence[Measured]) -> list[tuple[Measured, float]]:
    """Where each label stands: beside its point, and above the label below it."""
    gap = 0.045 * max(0.1, max(each.before for each in measured) - min(each.mean for each in measured))
    placed: list[tuple[Measured, float]] = []
    for each in sorted(measured, key=lambda each: each.mean):
        near = [height for other, height in placed if 1 / _NEAR < each.learns / other.learns < _NEAR]
        placed.append((each, max([each.mean, *(height + gap for height in near)])))
    return placed


def plot_ranks(layers: Sequence[tuple[str, Sequence[float], float]], path: Path) -> None:
    """A row for each layer: its singular values as shares of the largest, and its effective rank as a mark."""
    with mpl.rc_context({"svg.hashsalt": "ranks", "font.size": 8}):
        figure = Figure(figsize=(8, 0.8 + 0.18 * len(layers)), layout="constrained")
        axes = figure.subplots()
        most = max(len(values) for _, values, _ in layers)
        shares = [[value / values[0] for value in values] + [float("nan")] * (most - len(values)) for _, values, _ in layers]
        image = axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.plot([effective - 1 for *_, effective in layers], range(len(layers)), "|", color="#c8553d", markersize=7)
        axes.set_yticks(range(len(layers)), [layer.removeprefix("model.layers.") for layer, *_ in layers])
        axes.set_xticks(range(most), [str(number + 1) for number in range(most)])
        axes.set_xlabel("singular value, as a share of the layer's largest; the red mark is the effective rank")
        figure.colorbar(image, ax=axes, shrink=0.6)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
