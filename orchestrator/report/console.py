"""The terminal: the plan first, a view that changes while a stage trains, then where the results lie.

Where the output is no terminal, or plain lines are asked for, there are such, at most one in ten seconds.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console as Terminal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.plan.plan import Plan, PlannedStage, State
from orchestrator.plan.record import Record
from orchestrator.report import comparison, evaluation
from orchestrator.report.comparison import Measured, Yardstick
from orchestrator.report.findings import findings
from orchestrator.report.live import Watched, live_view, progress_line
from orchestrator.report.preparing import Prepared, PreparingLine
from orchestrator.report.stage_words import artifacts, what_learns
from orchestrator.report.words import shown
from orchestrator.schema import Recipe

_POLL_SECONDS = 0.5
_PLAIN_LINE_SECONDS = 10.0
_COLOURS = {State.DONE: "green", State.RESUME: "cyan", State.RUN: "yellow", State.SKIP: "dim"}


class Console:
    """Tells a person what happens."""

    def __init__(self, terminal: Terminal | None = None, is_plain: bool = False) -> None:
        self._terminal = terminal or Terminal(highlight=False, soft_wrap=True)
        self._is_live = self._terminal.is_terminal and not is_plain

    def say(self, text: str) -> None:
        self._print(text, "dim")

    def show_plan(self, recipe: Recipe, plan: Plan) -> None:
        self._print(recipe.name, "bold")
        headings = ("", "stage", "what learns", "state", "why")
        if not self._terminal.is_terminal:
            rows = [(str(each.number), each.name, what_learns(each), each.state.value, each.reason) for each in plan.stages]
            self._show_plain_table(headings, rows)
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for planned in plan.stages:
            state = Text(planned.state.value, style=_COLOURS[planned.state])
            table.add_row(str(planned.number), planned.name, what_learns(planned), state, Text(planned.reason))
        self._terminal.print(table)

    def show_table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if not self._terminal.is_terminal:
            # There a table would be folded to 80 columns.
            self._show_plain_table(headings, rows)
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._terminal.print(table)

    def _show_plain_table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        widths = [max(cell_len(line[place]) for line in (headings, *rows)) for place in range(len(headings))]
        for line in (headings, *rows):
            cells = (set_cell_size(cell, width) for cell, width in zip(line, widths, strict=True))
            self._print("  ".join(cells).rstrip())

    def show_learning(self, kinds: Mapping[str, tuple[int, int]]) -> None:
        """By kind of module how many parameters learn, and of how many."""
        rows = [(f"  {kind}", f"{trained:,}", f"{total:,}") for kind, (trained, total) in kinds.items() if trained]
        frozen = sum(total for trained, total in kinds.values() if not trained)
        self.show_table(("  learns", "parameters", "of"), [*rows, ("  all else is frozen", "", f"{frozen:,}")])

    def show_comparison(self, measured: Sequence[Measured], yardstick: Yardstick | None = None) -> None:
        if not self._terminal.is_terminal:
            # Without a terminal a table has 80 columns, which fold this one beyond reading.
            self._print(comparison.table(measured, yardstick).rstrip())
            return
        self.show_table(comparison.headings(yardstick), comparison.rows(measured, yardstick))
        if yardstick:
            self.say(yardstick.verdict(measured))

    def show_evaluation(self, models: Sequence[Mapping[str, Any]]) -> None:
        if self._terminal.is_terminal:
            self.show_table(evaluation.headings(models), evaluation.rows(models))
        else:
            self._print(evaluation.table(models).rstrip())

    def stage_begins(self, planned: PlannedStage) -> None:
        heading = Text.assemble((f"{planned.number} {planned.name}", "bold"), f" → {shown(planned.folder)}")
        self._terminal.print(heading)

    def stage_ends(self, planned: PlannedStage, record: Record) -> None:
        for line in findings(planned, record.results):
            self._print(f"  {line}")

    def warn(self, text: str) -> None:
        self._print(text, "yellow")

    def note(self, text: str) -> None:
        """About the command itself, where its output is somebody else's; on stderr."""
        Terminal(stderr=True, highlight=False, soft_wrap=True).print(Text(text, style="dim"))

    def fail(self, text: str) -> None:
        """An error that a person can act on; on stderr."""
        Terminal(stderr=True, highlight=False, soft_wrap=True).print(Text(text, style="red"))

    @contextmanager
    def training(self, watched: Watched) -> Iterator[None]:
        """Shows how far a training stage is until the `with` ends."""

        def line() -> str | None:
            return progress_line(watched.look(), watched.num_steps)

        if not self._is_live:
            with self._watched("", line):
                yield
            return
        view = Live(get_renderable=lambda: live_view(watched), console=self._terminal, refresh_per_second=2, transient=True)
        try:
            with view:
                yield
        finally:
            if text := line():
                self._print(f"  {text}")

    def preparing(self, look: Callable[[], Prepared | None]) -> AbstractContextManager[None]:
        """Shows how far the preparation of data is, until the `with` ends."""
        return self._watched("preparing the data", PreparingLine(look))

    @contextmanager
    def _watched(self, before: str, line: Callable[[], str | None]) -> Iterator[None]:
        """Shows a line that changes, and `before` until there is one."""
        finished = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(before, line, finished), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            finished.set()
            watcher.join()

    def show_results(self, plan: Plan) -> None:
        done = [planned for planned in plan.stages if planned.state is State.DONE]
        if not done:
            return
        self._print("results", "bold")
        for planned in done:
            for path in artifacts(planned):
                self._print(f"  {planned.name:<12} {shown(path)}")

    def _print(self, text: str, style: str = "") -> None:
        # As a Text, because Rich would read a [word] in a path or a recipe's value as markup.
        self._terminal.print(Text(text, style))

    def _watch(self, before: str, line: Callable[[], str | None], finished: threading.Event) -> None:
        if not self._is_live:
            self._watch_plainly(line, finished)
            return
        with self._terminal.status(f"  {before}", spinner="dots") as status:
            while not finished.wait(_POLL_SECONDS):
                if text := line():
                    status.update(f"  {text}")
        if text := line():
            self._print(f"  {text}")

    def _watch_plainly(self, line: Callable[[], str | None], finished: threading.Event) -> None:
        shown, shown_at = "", time.monotonic()
        while True:
            over = finished.wait(_POLL_SECONDS)
            text = line()
            due = over or time.monotonic() - shown_at > _PLAIN_LINE_SECONDS
            if text and due and text != shown:
                self._print(f"  {text}")
                shown, shown_at = text, time.monotonic()
            if over:
                return
