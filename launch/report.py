"""Writes what came of a run as one page, and sums it up: python launch/report.py runs

    python launch/report.py PLACE [OTHER] [--out report.html]

PLACE is a run root, a folder or a URL such as s3://bucket/runs, or the folder of a stage, which stands for all that it was
made from. With OTHER the page begins with what differs between the two. The page needs no network.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# The project also runs from a checkout that was never installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.errors import OrchestratorError, RecipeError
from orchestrator.report.console import Console
from orchestrator.report.diff import StageDifference, differences
from orchestrator.report.page import GENERATOR, held_out_table, page
from orchestrator.report.story import Story
from orchestrator.report.words import duration
from orchestrator.retrospect import stories
from orchestrator.store import write_bytes


def main(arguments: Sequence[str]) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", metavar="PLACE")
    parser.add_argument("other", nargs="?", metavar="OTHER")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page; report.html by default")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        _check_free(options.out)
        told = stories(options.place)
        other = stories(options.other) if options.other else []
    except OrchestratorError as error:
        console.fail(str(error))
        return 2
    unlike = differences(told, other) if options.other else []
    everything = list({story.folder: story for story in (*told, *other)}.values())
    title = " against ".join(place for place in (options.place, options.other) if place)
    html = page(title, _summary(everything), everything, unlike, (options.place, options.other or ""))
    write_bytes(options.out, html.encode("utf-8"))
    _show(everything, unlike, console)
    console.say(f"written to {options.out}")
    return 0


def _check_free(out: Path) -> None:
    """RecipeError where something else stands that is no page of ours."""
    if out.exists() and not (out.is_file() and GENERATOR in out.read_text(encoding="utf-8", errors="replace")[:1000]):
        raise RecipeError(f"{out}: is there already, and is no report; give another --out")


def _summary(told: Sequence[Story]) -> str:
    done = sum(story.state == "done" for story in told)
    seconds = sum(story.results.get("seconds", 0.0) for story in told)
    restarts = sum(max(0, story.history.get("attempts", 1) - 1) for story in told)
    tokens = sum(story.results.get("tokens", 0) for story in told if story.kind == "train")
    parts = [
        f"{done} of {len(told)} stages done in {duration(seconds)}",
        f"{tokens:,} tokens learned",
        f"{restarts} restarts",
    ]
    return ", ".join(parts)


def _show(told: Sequence[Story], unlike: Sequence[StageDifference], console: Console) -> None:
    console.say(_summary(told))
    table = held_out_table(told)
    numbers = dict(table.rows)
    headings = ["stage", "state", *(f"{name} {when}" for name in table.names for when in ("before", "after"))]
    blank = [""] * (2 * len(table.names))
    console.show_table(headings, [(story.folder, story.state, *numbers.get(story.folder, blank)) for story in told])
    for each in unlike:
        if not each.is_same:
            rows = [*each.asked, *each.results, *each.environment]
            console.show_table((each.name, "A", "B"), rows or [("only in one of them", "", "")])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
