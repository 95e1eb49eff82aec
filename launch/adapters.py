"""Looks after adapters: python launch/adapters.py list runs

list ROOT                       the adapters below a folder
inspect FOLDER                  what base and tokenizer it belongs to, what was trained, from which pipeline
verify FOLDER [--base BASE]     whether it is what was written, and belongs to the base
ranks FOLDER [--plot FILE]      how much of its rank each layer uses
combine --out FOLDER ADAPTER=WEIGHT ADAPTER=WEIGHT …    one adapter from several
"""

# ruff: noqa: E402

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

# Before it is imported: it would complain of the lack of a kernel that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# The project also runs from a checkout that was never installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.checkpoint.combined import combine
from orchestrator.checkpoint.inventory import describe, find_adapters, verify
from orchestrator.errors import ModelError, OrchestratorError
from orchestrator.model.adapters import layer_ranks, read_merge_rule, weights_of
from orchestrator.model.adapters.several import How
from orchestrator.report.console import Console
from orchestrator.report.words import size


def main(arguments: Sequence[str]) -> int:
    """The exit code."""
    console = Console()
    options = _parser().parse_args(arguments)
    try:
        options.act(options, console)
    except OrchestratorError as error:
        console.fail(str(error))
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list")
    listing.add_argument("root", type=Path)
    listing.set_defaults(act=_list)
    for name, act in (("inspect", _inspect), ("verify", _verify), ("ranks", _ranks)):
        action = actions.add_parser(name)
        action.add_argument("folder", type=Path)
        action.set_defaults(act=act)
        if name == "verify":
            action.add_argument("--base", type=Path)
        if name == "ranks":
            action.add_argument("--plot", type=Path, help="an .svg or .png file")
    combining = actions.add_parser("combine")
    combining.add_argument("adapters", nargs="+", metavar="ADAPTER=WEIGHT")
    combining.add_argument("--out", type=Path, required=True)
    combining.add_argument("--how", choices=get_args(How), default="linear")
    combining.add_argument("--density", type=float, help="share of the values that ties and dare keep")
    combining.add_argument("--base", type=Path, help="where the base lies now, if not where it was")
    combining.set_defaults(act=_combine)
    return parser


def _list(options: argparse.Namespace, console: Console) -> None:
    found = list(find_adapters(options.root))
    if not found:
        raise ModelError(f"{options.root}: there is no adapter below it")
    rows = [(str(each.folder), each.method, size(each.bytes), each.manifest.origin.base_name) for each in found]
    console.show_table(("adapter", "holds", "size", "base"), rows)


def _inspect(options: argparse.Namespace, console: Console) -> None:
    found = describe(options.folder)
    origin = found.manifest.origin
    console.show_table(
        ("", ""),
        [
            ("holds", found.method),
            ("parameters", f"{found.parameters:,} in {len(found.manifest.tensors):,} tensors, {size(found.bytes)}"),
            ("base", f"{origin.base_name} ({origin.base_hash[:12]})"),
            ("tokenizer", f"{origin.tokenizer_hash[:12]}, in the folder itself"),
            ("stage", f"{origin.stage} ({origin.fingerprint[:12]}), step {origin.step:,}"),
            ("made from", ", ".join(f"{name} ({mark[:12]})" for name, mark in origin.parents.items()) or "the base alone"),
        ],
    )
    rows = [(kind, f"{count:,}", f"{parameters:,}") for kind, (count, parameters) in found.kinds.items()]
    console.show_table(("module", "tensors", "parameters"), rows)


def _verify(options: argparse.Namespace, console: Console) -> None:
    found = verify(options.folder, options.base)
    console.say(f"{options.folder}: {len(found.manifest.tensors):,} tensors are what was written, finite and not zero")


def _ranks(options: argparse.Namespace, console: Console) -> None:
    from safetensors.torch import load_file  # noqa: PLC0415

    is_peft = verify(options.folder).is_peft
    found = layer_ranks(load_file(weights_of(options.folder)), read_merge_rule(options.folder)) if is_peft else []
    if not found:
        raise ModelError(f"{options.folder}: holds no low-rank factors")
    rows = [
        (each.layer, str(each.rank), f"{each.effective_rank:.1f}", " ".join(f"{x:.3g}" for x in each.singular_values[:4]))
        for each in found
    ]
    console.show_table(("layer", "rank", "effective", "largest singular values"), rows)
    if options.plot:
        from orchestrator.report.plots import plot_ranks  # noqa: PLC0415

        plot_ranks([(each.layer, each.singular_values, each.effective_rank) for each in found], options.plot)
        console.say(f"drawn in {options.plot}")


def _combine(options: argparse.Namespace, console: Console) -> None:
    weights = {}
    for given in options.adapters:
        folder, _, weight = given.rpartition("=")
        try:
            weights[Path(folder)] = float(weight)
        except ValueError:
            raise ModelError(f"{given}: give a folder and its weight, such as runs/attention-…/adapter=0.5") from None
    combine(weights, options.how, options.density, options.out, options.base)
    console.say(f"{options.out}: {' + '.join(f'{weight:g} x {folder}' for folder, weight in weights.items())}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
