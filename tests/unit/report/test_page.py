"""A report's page: whole in itself, true to what it is told, and safe with whatever text a run holds."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from orchestrator.report.charts import Line, line_chart, lineage
from orchestrator.report.diff import differences
from orchestrator.report.page import held_out_table, page
from orchestrator.report.story import Story, newest_by_name
from orchestrator.report.variants import variants

EVIL = "<script>alert(1)</script>"


def numbers(bits: float) -> dict[str, float]:
    return {"loss": bits, "bits_per_character": 2 * bits, "bits_per_byte": bits, "perplexity": 9.0}


def row(step: int, loss: float) -> dict[str, Any]:
    parts = {"learning_rate": 1e-3, "tokens_per_second": 500.0, "memory_bytes": 2e9, "gradient_norm": 0.5, "seconds": 1.0}
    return {"step": step, "loss": loss, **parts}


def story(name: str, mark: str, parents: dict[str, str] | None = None, **more: Any) -> Story:
    identity = {"stage": {"kind": "train", "learning_rate": 1e-3}, "parents": parents or {}}
    results = {
        "steps": 4,
        "kept_step": 2,
        "trainable": 10,
        "parameters": 100,
        "tokens": 64,
        "tokens_per_second": 512.0,
        "seconds": 61.0,
        "held_out": {"validation": {"before": numbers(3.0), "after": numbers(1.5)}},
        "history": {"attempts": 2, "failures": {"hang": 1}, "lost_steps": 1, "recovery_seconds": [2.0], "goodput": 0.5},
        "step": {"seconds": 1.0, "forward_seconds": 0.4, "backward_seconds": 0.6},
    }
    events = [
        {"time": 1.0, "event": "begin", "command": f"python launch/run.py name={EVIL}"},
        {"time": 2.0, "event": "attempt", "workers": 2},
        {"time": 3.0, "event": "failure", "cause": "hang", "step": 1, "message": EVIL},
        {"time": 4.0, "event": "attempt", "workers": 2},
    ]
    samples = [{"prompt": "从前", "text": f"有一个{EVIL}"}]
    evaluations = [{"step": 2, "held_out": {"validation": numbers(1.5)}, "samples": samples}]
    known: dict[str, Any] = {
        "folder": f"{name}-{mark[:12]}",
        "name": name,
        "kind": "train",
        "state": "done",
        "pipeline": "demo",
        "fingerprint": mark,
        "parents": parents or {},
        "identity": identity,
        "results": results,
        "finished": 5.0,
        "environment": {"torch": "2.13"},
        "rows": [row(1, 4.0), row(2, 3.0), row(3, float("nan"))],
        "events": events,
        "evaluations": evaluations,
    }
    return Story(**(known | more))


VOCABULARY = story(
    "vocabulary",
    "a" * 64,
    kind="vocabulary",
    rows=(),
    evaluations=(),
    results={
        "seconds": 2.0,
        "compression": {
            "new_language": {"characters": 50, "tokens_per_character_before": 2.5, "tokens_per_character_after": 0.8}
        },
        "examples": [{"text": "中文", "before": ["<0xE4>", "<0xB8>"], "after": ["▁中文"]}],
    },
)
LONG = story("a_stage_with_a_name_that_is_much_too_long_for_a_box", "b" * 64, {"vocabulary": "a" * 64})
SECOND = story("instruct", "c" * 64, {LONG.name: "b" * 64})
STORIES = [VOCABULARY, LONG, SECOND]


class _Reader(HTMLParser):
    """What a browser would fetch, what it would run, and where links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.scripts = 0
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.scripts += tag == "script"
        self.fetched += [value for name in ("src", "data", "srcset") if (value := known.get(name))]
        self.fetched += [known["href"] or ""] if tag == "link" else []
        if known.get("id"):
            self.ids.append(known["id"] or "")
        if tag == "a":
            self.links.append(known["href"] or "")


def read(html: str) -> _Reader:
    reader = _Reader()
    reader.feed(html)
    return reader


def test_the_page_needs_no_network_and_runs_nothing() -> None:
    html = page("runs", "3 of 3", STORIES)
    found = read(html)
    assert (found.fetched, found.scripts) == ([], 0)
    assert "url(" not in html
    assert EVIL not in html
    assert html.count("&lt;script&gt;") >= 3


def test_every_link_leads_to_a_place_on_the_page() -> None:
    found = read(page("runs", "", STORIES))
    assert len(found.links) > 5
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)


def test_it_shows_numbers_samples_pieces_and_what_happened() -> None:
    html = page("runs", "", STORIES)
    for said in (
        "3.000",
        "1.500",
        "中文",
        "▁中文",
        "有一个",
        "the state of step 2 was kept",
        "failure, cause hang",
        "torch 2.13",
    ):
        assert said in html, said
    assert "prefers-color-scheme: dark" in html


def test_what_is_not_done_is_shown_as_far_as_it_is_known() -> None:
    begun = Story("attention-dddddddddddd", "attention", "", "running", "demo", "d" * 12, rows=[row(1, 4.0)])
    html = page("runs", "", [begun])
    assert "attention-dddddddddddd" in html
    assert "running" in html


def test_the_held_out_table_has_what_each_stage_measured() -> None:
    table = held_out_table(STORIES)
    assert table.names == ["validation"]
    assert table.rows == [(LONG.folder, ["3.000", "1.500"]), (SECOND.folder, ["3.000", "1.500"])]
    # Older records know no bytes.
    old = replace(SECOND, results={"held_out": {"validation": {"before": {"bits_per_character": 4.0}, "after": {}}}})
    assert held_out_table([old]).rows == [(old.folder, ["4.000", ""])]


def test_a_chart_keeps_the_ends_of_its_line_and_leaves_out_what_is_no_number() -> None:
    points = [(float(step), 5.0 - step / 500) for step in range(1, 2001)] + [(2001.0, float("nan"))]
    drawn = line_chart("loss", [Line("training", points)])
    svg = ET.fromstring(drawn[drawn.index("<svg") : drawn.index("</svg>") + 6])
    (line,) = (part for part in svg if part.tag == "polyline")
    places = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert 200 <= len(places) <= 400
    assert places[0][1] < places[-1][1], "down is up in SVG"
    assert line_chart("loss", [Line("training", [(1.0, float("nan"))])]) == ""


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [0.0, 0.0], [-1e-9, 1e9]])
def test_a_chart_of_few_or_equal_values_can_be_drawn(values: list[float]) -> None:
    drawn = line_chart("x", [Line("x", [(float(step), value) for step, value in enumerate(values)])])
    ET.fromstring(drawn[drawn.index("<svg") : drawn.index("</svg>") + 6])
    assert "nan" not in drawn


def test_the_lineage_goes_from_left_to_right() -> None:
    svg = ET.fromstring(lineage(STORIES))
    places = {node.findtext(".//title"): float(node.find(".//rect").attrib["x"]) for node in svg.iter("a")}  # pyrefly: ignore
    assert list(places.values()) == sorted(places.values())
    assert len(set(places.values())) == 3
    assert sum(part.tag == "path" for part in svg) == 2
    shown = [text.text or "" for text in svg.iter("text")]
    assert any(name.endswith("…") for name in shown)


def test_two_runs_are_compared_by_what_was_asked_and_what_came_out() -> None:
    other = replace(
        SECOND,
        fingerprint="e" * 64,
        identity={"stage": {"kind": "train", "learning_rate": 2e-3}, "parents": {}},
        results={**SECOND.results, "tokens_per_second": 600.0},
        environment={"torch": "2.14"},
    )
    found = {each.name: each for each in differences(STORIES, [VOCABULARY, other])}
    assert found["vocabulary"].is_same
    assert found[LONG.name].second is None
    assert ("learning_rate", "0.001", "0.002") in found["instruct"].asked
    assert ("tokens_per_second", "512", "600") in found["instruct"].results
    assert found["instruct"].environment == [("torch", "2.13", "2.14")]
    html = page("a against b", "", STORIES, list(found.values()), ("a", "b"))
    assert "What differs" in html
    assert "0.002" in html


def test_variants_of_a_stage_stand_beside_each_other_by_what_differs() -> None:
    other = replace(
        SECOND,
        folder="instruct-eeeeeeeeeeee",
        fingerprint="e" * 64,
        identity={**SECOND.identity, "stage": {"kind": "train", "learning_rate": 2e-3}},
    )
    ((name, fields, texts, rows),) = variants([*STORIES, other])
    assert (name, fields, texts) == ("instruct", ["learning_rate"], ["validation"])
    assert [(folder, values) for folder, values, _ in rows] == [(SECOND.folder, ["0.001"]), (other.folder, ["0.002"])]
    assert "learning_rate" in re.sub(r"<[^>]+>", " ", page("runs", "", [*STORIES, other]))


def test_the_newest_of_a_name_stands_for_it() -> None:
    older, newer = replace(SECOND, finished=1.0, folder="old"), replace(SECOND, finished=2.0, folder="new")
    assert newest_by_name([newer, older])["instruct"].folder == "new"
