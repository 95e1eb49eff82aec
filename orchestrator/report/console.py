"""The terminal: the plan first, one line per stage while it trains, then where the results lie.

Where the output is no terminal there are plain lines instead of a moving one, at most one in ten seconds.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console as Terminal
from rich.table import Table
from rich.text import Text

from orchestrator.plan.plan import Plan, PlannedStage, State
from orchestrator.plan.record import Record
from orchestrator.report import comparison
from orchestrator.report.comparison import Measured, Yardstick
from orchestrator.report.history import described
from orchestrator.report.preparing import Prepared, PreparingLine
from orchestrator.report.words import duration, size
from orchestrator.schema import (
    BitFit,
    Bottleneck,
    ExportStage,
    FullFineTuning,
    Ia3,
    Lora,
    MergeStage,
    Method,
    PrefixTuning,
    PromptTuning,
    PTuning,
    Recipe,
    Subspace,
    TrainStage,
    VocabularyStage,
)
from orchestrator.schema.methods import ALL_LINEAR

_POLL_SECONDS = 0.5
_PLAIN_LINE_SECONDS = 10.0
_COLOURS = {State.DONE: "green", State.RESUME: "cyan", State.RUN: "yellow", State.SKIP: "dim"}


class Console:
    """Tells a person what happens."""

    def __init__(self, terminal: Terminal | None = None) -> None:
        self._terminal = terminal or Terminal(highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        self._print(text, "dim")

    def show_plan(self, recipe: Recipe, plan: Plan) -> None:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("", "stage", "what learns", "state", "why"):
            table.add_column(heading, overflow="fold")
        for planned in plan.stages:
            state = Text(planned.state.value, style=_COLOURS[planned.state])
            table.add_row(str(planned.number), planned.name, what_learns(planned), state, Text(planned.reason))
        self._print(recipe.name, "bold")
        self._terminal.print(table)

    def show_table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._terminal.print(table)

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

    def stage_begins(self, planned: PlannedStage) -> None:
        heading = Text.assemble((f"{planned.number} {planned.name}", "bold"), f" → {shown(planned.folder)}")
        self._terminal.print(heading)

    def stage_ends(self, planned: PlannedStage, record: Record) -> None:
        for line in _findings(planned, record.results):
            self._print(f"  {line}")

    def warn(self, text: str) -> None:
        self._print(text, "yellow")

    def note(self, text: str) -> None:
        """About the command itself, where its output is somebody else's; on stderr."""
        Terminal(stderr=True, highlight=False, soft_wrap=True).print(Text(text, style="dim"))

    def fail(self, text: str) -> None:
        """An error that a person can act on; on stderr."""
        Terminal(stderr=True, highlight=False, soft_wrap=True).print(Text(text, style="red"))

    def progress(self, num_steps: int, rows: Callable[[], Sequence[dict[str, Any]]]) -> AbstractContextManager[None]:
        """Shows how far training is, from the rows of its metrics, until the `with` ends."""

        def line() -> str | None:
            return _progress_line(seen, num_steps) if (seen := rows()) else None

        return self._watched("loading the model", line)

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
        if not self._terminal.is_terminal:
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


def what_learns(planned: PlannedStage) -> str:
    """A clause that says what a stage trains or makes."""
    stage = planned.stage
    match stage:
        case VocabularyStage(merge="none"):
            return "nothing: keeps the base tokenizer"
        case VocabularyStage():
            return f"nothing: merges a vocabulary ({stage.merge})"
        case MergeStage():
            return "nothing: makes what was learned part of the base"
        case ExportStage():
            return "nothing: writes one adapter" + (" and the merged model" if stage.merged else "")
        case TrainStage():
            rows = f"new rows of {', '.join(stage.new_rows)}" if stage.new_rows else ""
            parts = (_method_in_words(stage.method), ", ".join(stage.modules_to_save), rows)
            on = f", on a base in {stage.quantization.kind}" if stage.quantization else ""
            return " + ".join(part for part in parts if part) + on


def _method_in_words(method: Method | None) -> str:
    match method:
        case Lora():
            kind = " ".join(
                word
                for word, used in (
                    ("rsLoRA", method.rslora),
                    ("DoRA", method.dora),
                    ("PiSSA", method.init == "pissa"),
                    ("LoftQ", method.init == "loftq"),
                )
                if used
            )
            return f"{kind or 'LoRA'} r{method.rank} on {_layers_in_words(method.targets)}"
        case FullFineTuning():
            return "every weight"
        case Subspace():
            return f"every weight, in a subspace of {method.dimension:,} dimensions"
        case BitFit():
            return "biases"
        case Ia3():
            return f"IA3 on {_layers_in_words(method.targets)}"
        case Bottleneck():
            return (
                f"networks {method.size} wide behind {'attention and MLP' if method.placement == 'houlsby' else 'the MLP'}"
            )
        case PromptTuning() | PTuning() | PrefixTuning():
            return f"{method.virtual_tokens} virtual tokens ({method.kind.replace('_', ' ')})"
        case None:
            return ""


def _layers_in_words(targets: Sequence[str] | str) -> str:
    if isinstance(targets, str):
        return "all linear layers" if targets == ALL_LINEAR else targets
    return ", ".join(name.removesuffix("_proj") for name in targets)


def artifacts(planned: PlannedStage) -> list[Path]:
    """What a finished stage left for others to use."""
    match planned.stage:
        case VocabularyStage():
            names = ["tokenizer", "base"]
        case TrainStage():
            names = ["adapter", "model"]
        case MergeStage():
            names = ["model"]
        case ExportStage():
            names = ["adapter", "merged"]
    return [planned.folder / name for name in names if (planned.folder / name).is_dir()]


def shown(path: Path) -> str:
    """A path as a person would type it from here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _progress_line(rows: Sequence[dict[str, Any]], num_steps: int) -> str:
    last = rows[-1]
    recent = rows[-10:]
    pace = sum(row["seconds"] for row in recent) / len(recent)
    rate = sum(row["tokens_per_second"] for row in recent) / len(recent)
    left = duration((num_steps - last["step"]) * pace)
    return f"step {last['step']:,}/{num_steps:,}  loss {last['loss']:.3f}  {rate:,.0f} tokens/s  {left} left"


def _findings(planned: PlannedStage, results: dict[str, Any]) -> list[str]:
    """What a person would want to know of a finished stage, a line each."""
    if isinstance(planned.stage, VocabularyStage):
        return _vocabulary_findings(results)
    if isinstance(planned.stage, MergeStage):
        return [f"a model of {size(results['merged_bytes'])}", f"done in {duration(results['seconds'])}"]
    if isinstance(planned.stage, ExportStage):
        difference = results.get("merged_logit_difference")
        return (
            [f"merged and adapter agree: logits differ by at most {difference:.2g} of the largest"]
            if difference is not None
            else []
        )
    trainable, total = results["trainable"], results["parameters"]
    lines = [f"trained {trainable:,} of {total:,} parameters ({trainable / total:.2%})"]
    for name, values in results["held_out"].items():
        before, after, base = (
            part["bits_per_character"] for part in (values["before"], values["after"], results["reference"][name])
        )
        lines.append(f"{name}: {before:.3f} → {after:.3f} bits per character (base {base:.3f})")
    if step := results.get("step"):
        lines.append(_step_in_words(step))
    if results["checkpoint_bytes"]:
        # Of each parameter that learns: an fp32 master and Adam's two moments.
        whole = results["checkpoint_bytes"] * total / trainable
        lines.append(f"checkpoints of {size(results['checkpoint_bytes'])}; with the whole model in them {size(whole)}")
    if happened := described(results["history"]):
        lines.append(happened)
    return [*lines, f"done in {duration(results['seconds'])}"]


def _step_in_words(step: dict[str, float]) -> str:
    """Medians over the steps; their parts as shares, the largest first."""
    parts = {name.removesuffix("_seconds"): value for name, value in step.items() if name.endswith("_seconds")}
    shares = sorted(((value / step["seconds"], name) for name, value in parts.items()), reverse=True)
    listed = ", ".join(f"{name} {share:.0%}" for share, name in shares if share >= 0.005)
    of_peak = f"; {step['flops_utilisation']:.0%} of the devices' peak" if "flops_utilisation" in step else ""
    return f"a step took {step['seconds']:.3g}s: {listed}{of_peak}"


def _vocabulary_findings(results: dict[str, Any]) -> list[str]:
    base, added, total, rows = (results.get(name, 0) for name in ("base_tokens", "added_tokens", "tokens", "rows"))
    lines = [f"{base:,} tokens + {added:,} new = {total:,}, in {rows:,} rows"]
    if dropped := results.get("dropped_pieces"):
        lines.append("left out: " + ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in dropped.items()))
    for name, counts in results.get("compression", {}).items():
        before, after = counts["tokens_per_character_before"], counts["tokens_per_character_after"]
        lines.append(f"{name.replace('_', ' ')}: {before:.3f} → {after:.3f} tokens per character")
    return [*lines, f"done in {duration(results['seconds'])}"]
