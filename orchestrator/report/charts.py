"""Line charts and a graph of stages as SVG that takes its colours from the page, so that they suit light and dark."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from orchestrator.report.story import Story

_WIDTH, _HEIGHT = 560, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 10, 34
_POINTS = 400
"""Of a line at most; more are thinned out by means."""
_NODE = (178, 46)
_GAP = (56, 18)
_NAME_CHARACTERS = 22


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    has_marks: bool = False


def line_chart(title: str, lines: Sequence[Line], unit: str = "") -> str:
    """Over steps. Lines without a finite point are left out; with none at all nothing is drawn."""
    drawn = [Line(line.name, _thinned(line.points), line.has_marks) for line in lines]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return ""
    xs, ys = ([point[axis] for line in drawn for point in line.points] for axis in (0, 1))
    across, up = _Scale(xs, _LEFT, _WIDTH - _RIGHT), _Scale(ys, _HEIGHT - _BOTTOM, _TOP)
    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for value in _ticks(min(ys), max(ys)):
        height = up(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{height + 3.5:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in _ticks(min(xs), max(xs), whole=True):
        place = f'x="{across(value):.1f}" y="{_HEIGHT - _BOTTOM + 15}"'
        parts.append(f'<text class="tick" {place} text-anchor="middle">{_number(value)}</text>')
    parts.append(f'<text class="tick" x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">step</text>')
    for number, line in enumerate(drawn):
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline class="line s{number % 6}" points="{path}"><title>{escape(line.name)}</title></polyline>')
        if line.has_marks or len(line.points) == 1:
            parts += [
                f'<circle class="mark s{number % 6}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3">'
                f"<title>{escape(line.name)}, step {x:g}: {_number(y)}</title></circle>"
                for x, y in line.points
            ]
    parts.append("</svg>")
    names = "".join(f'<span class="key s{number % 6}">{escape(line.name)}</span>' for number, line in enumerate(drawn))
    heading = f"{escape(title)}{f' <small>({escape(unit)})</small>' if unit else ''}"
    return f"<figure><figcaption>{heading}{names if len(drawn) > 1 else ''}</figcaption>{''.join(parts)}</figure>"


def lineage(stories: Sequence[Story]) -> str:
    """Each stage as a box, in a column further to the right than all that it was made from."""
    by_mark = {story.fingerprint: story for story in stories if story.fingerprint}
    depths = _depths(by_mark)
    places: dict[str, tuple[int, int]] = {}
    rows: dict[int, int] = {}
    for mark in sorted(by_mark, key=lambda mark: (depths[mark], by_mark[mark].finished)):
        column = depths[mark]
        places[mark] = column, rows.get(column, 0)
        rows[column] = rows.get(column, 0) + 1
    if not places:
        return ""
    (width, height), (across, down) = _NODE, _GAP
    total = (max(rows) + 1) * (width + across), max(rows.values()) * (height + down)
    parts = [f'<svg class="lineage" viewBox="-2 -2 {total[0]} {total[1]}" style="max-width:{total[0]}px" role="img">']
    for mark, story in by_mark.items():
        for parent in story.parents.values():
            if parent in places:
                parts.append(_edge(places[parent], places[mark]))
    parts += [_node(by_mark[mark], place) for mark, place in places.items()]
    return "".join([*parts, "</svg>"])


def _depths(by_mark: Mapping[str, Story]) -> dict[str, int]:
    depths: dict[str, int] = {}

    def depth(mark: str) -> int:
        if mark not in depths:
            parents = [parent for parent in by_mark[mark].parents.values() if parent in by_mark]
            depths[mark] = 1 + max((depth(parent) for parent in parents), default=-1)
        return depths[mark]

    for mark in by_mark:
        depth(mark)
    return depths


def _corner(place: tuple[int, int]) -> tuple[float, float]:
    return place[0] * (_NODE[0] + _GAP[0]), place[1] * (_NODE[1] + _GAP[1])


def _edge(start: tuple[int, int], end: tuple[int, int]) -> str:
    (x1, y1), (x2, y2) = _corner(start), _corner(end)
    x1, y1, y2 = x1 + _NODE[0], y1 + _NODE[1] / 2, y2 + _NODE[1] / 2
    bend = _GAP[0] / 2
    return (
        f'<path class="edge" d="M{x1:.0f},{y1:.0f} C{x1 + bend:.0f},{y1:.0f} {x2 - bend:.0f},{y2:.0f} {x2:.0f},{y2:.0f}"/>'
    )


def _node(story: Story, place: tuple[int, int]) -> str:
    x, y = _corner(place)
    name = story.name if len(story.name) <= _NAME_CHARACTERS else f"{story.name[: _NAME_CHARACTERS - 1]}…"
    return (
        f'<a href="#{escape(story.folder)}"><g class="node {escape(story.state)}"><title>{escape(story.folder)}: '
        f'{escape(story.state)}</title><rect x="{x:.0f}" y="{y:.0f}" width="{_NODE[0]}" height="{_NODE[1]}" rx="8"/>'
        f'<text class="name" x="{x + 12:.0f}" y="{y + 20:.0f}">{escape(name)}</text>'
        f'<text class="hash" x="{x + 12:.0f}" y="{y + 36:.0f}">{escape(story.fingerprint[:12])} '
        f"{escape(story.state)}</text></g></a>"
    )


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    finite = [point for point in points if all(math.isfinite(value) for value in point)]
    every = max(1, -(-len(finite) // _POINTS))
    if every == 1:
        return finite
    parts = [finite[at : at + every] for at in range(0, len(finite), every)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


class _Scale:
    """From values to places, with a little room where all values are one."""

    def __init__(self, values: Sequence[float], first: float, last: float) -> None:
        self._least, most = min(values), max(values)
        self._span = (most - self._least) or abs(self._least) or 1.0
        self._first, self._last = first, last

    def __call__(self, value: float) -> float:
        return self._first + (value - self._least) / self._span * (self._last - self._first)


def _ticks(least: float, most: float, whole: bool = False) -> list[float]:
    """Three to six round numbers between the two."""
    span = most - least
    if span <= 0:
        return [least]
    step = 10.0 ** math.floor(math.log10(span / 4))
    step = next(step * factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    if whole:
        step = max(1.0, step)
    first = math.ceil(least / step)
    return [number * step for number in range(first, math.floor(most / step) + 1)]


def _number(value: float) -> str:
    if value and abs(value) < 1e-4:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
