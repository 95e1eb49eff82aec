"""Says what a recipe will take before anything runs: python launch/plan.py recipe=chinese_llama scale=7b --device H100

    python launch/plan.py WORD… [--device NAME] [--workers N] [--efficiency 0.4] [--price PER_HOUR] [--json]

WORD is any word of launch/run.py. It needs no GPU and no weights: sizes come from the base's configuration. Without --device
it plans for workers on CPUs, and says nothing of time.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The project also runs from a checkout that was never installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.assign import prepared_data
from orchestrator.compose import compose
from orchestrator.data.summary import Summary
from orchestrator.errors import OrchestratorError
from orchestrator.plan.devices import DEVICES
from orchestrator.plan.forecast import Forecast, StageForecast, Wanted, forecast
from orchestrator.plan.inputs import find_inputs
from orchestrator.plan.memory import Memory
from orchestrator.report.console import Console
from orchestrator.report.words import size
from orchestrator.run_root import run_root
from orchestrator.schema import Recipe


def main(arguments: Sequence[str]) -> int:
    """The exit code."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        recipe = compose(options.words)
        workers = options.workers or (recipe.workers if isinstance(recipe.workers, int) else 1)
        found = forecast(recipe, Wanted(options.device, workers, options.efficiency, options.price))
        data = _data(recipe, found)
    except OrchestratorError as error:
        console.fail(str(error))
        return 2
    if options.json:
        print(json.dumps(_as_json(found, data), ensure_ascii=False))
    else:
        _show(found, data, console)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--device", choices=list(DEVICES))
    parser.add_argument("--workers", type=_workers, help="one a device; the recipe's by default, or 1")
    parser.add_argument("--efficiency", type=_share, default=0.4, help="share of the device's peak that training reaches")
    parser.add_argument("--price", type=float, help="of a device for an hour")
    parser.add_argument("--json", action="store_true", help="all of it as one JSON object")
    return parser


def _workers(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no number of workers; give 1 or more")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share of a peak; give a number above 0, and 1 at most")
    return share


def _data(recipe: Recipe, found: Forecast) -> dict[str, Summary]:
    """By stage, of data that was tokenized before."""
    if not found.are_states_known:
        return {}
    return prepared_data(recipe, find_inputs(recipe), run_root(recipe.run_root), found.plan)


def _as_json(found: Forecast, data: dict[str, Summary]) -> dict[str, Any]:
    value = found.as_dict()
    for stage in value["stages"]:
        summary = data.get(stage["name"])
        counts = ("documents", "tokens", "rows", "truncated")
        stage["data"] = {name: getattr(summary, name) for name in counts} if summary else None
    return value


def _show(found: Forecast, data: dict[str, Summary], console: Console) -> None:
    for planned in found.plan.stages:
        state = f"{planned.state.value}  {planned.reason}" if found.are_states_known else "(base or data is not here)"
        console.say(f"{planned.number} {planned.name}: {state}")
        for stage in (each for each in found.stages if each.name == planned.name):
            _show_stage(stage, found, data.get(planned.name), console)
    for line in found.missing:
        console.note(f"not here yet: {line}")


def _show_stage(stage: StageForecast, found: Forecast, data: Summary | None, console: Console) -> None:
    most, share = "" if stage.is_exact else "up to ", stage.trainable / stage.parameters
    console.say(f"  learns {most}{stage.trainable:,} of {stage.parameters:,} parameters ({share:.2%})")
    work = f"{stage.global_batch:,} sequences of {stage.block_length:,} a step, {stage.step_flops:.3g} operations"
    console.say(f"  {work}; {_budget(stage)}")
    if data:
        passes = f", learned {stage.steps * stage.global_batch / data.rows:.2g} times" if stage.steps else ""
        console.say(f"  data: {data}{passes}")
    elif found.are_states_known:
        console.say("  data: not tokenized yet")
    console.say("  memory of a worker:")
    for row in (_HEADINGS, *(_memory_row(zero, each, found.zero) for zero, each in stage.memory.items())):
        console.say("    " + f"{row[0]:<8}" + "".join(f"{cell:>12}" for cell in row[1:]))
    if stage.largest_micro_batch is not None:
        console.say(f"  {_fit(stage, found)}")
    console.say(f"  leaves {size(stage.artifact_bytes)}; a checkpoint to resume from has {size(stage.checkpoint_bytes)}")


_HEADINGS = ("", "weights", "gradients", "optimizer", "activations", "logits", "rest", "total")


def _memory_row(zero: int, each: Memory, chosen: int) -> tuple[str, ...]:
    name = f"ZeRO-{zero}{' *' if zero == chosen else ''}"
    parts = (each.weights, each.gradients, each.optimizer, each.activations, each.logits, each.buffers + each.libraries)
    return (name, *(_held(part) for part in (*parts, each.total)))


def _held(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _fit(stage: StageForecast, found: Forecast) -> str:
    device = found.wanted.device
    if not stage.largest_micro_batch:
        return f"does not fit {device} with ZeRO-{found.zero}, not even one sequence at once"
    fits = "fits" if stage.largest_micro_batch >= stage.micro_batch else "is too many for"
    largest = f"the most at once is {stage.largest_micro_batch}"
    return f"a micro-batch of {stage.micro_batch} {fits} {device} with ZeRO-{found.zero}; {largest}"


def _budget(stage: StageForecast) -> str:
    if stage.tokens is None:
        return "its steps follow from its data, once that is prepared"
    parts = [f"{stage.steps:,} steps, {stage.tokens:,} tokens"]
    if stage.hours is not None:
        parts.append(f"{stage.hours:.1f} hours")
    if stage.price is not None:
        parts.append(f"{stage.price:,.0f} in all")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
