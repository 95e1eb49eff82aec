"""What `launch/plan.py` says that a worker holds, beside what workers of real runs held at most.

    python -m tests.bench.memory_forecast [--cases full,attention]

A random LLaMA of 59 million parameters, blocks of 512 tokens, two steps a case, on CPUs. Prints the table of the README.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.store import read_json
from tests.shared_data import ROOT

_SECONDS = 900
_BASE = (
    *("hidden_size=768", "intermediate_size=2112", "num_layers=8", "num_heads=12", "num_key_value_heads=12"),
    "max_positions=512",
)
_STAGE = (
    *("block_length=512", "global_batch_size=16", "steps=2", "resources.micro_batch_size=4"),
    "method.dropout=0",
)


@dataclass(frozen=True)
class Case:
    """A stage of the demonstration, changed."""

    name: str
    workers: int
    zero: int
    own: tuple[str, ...] = ()
    """What the stage says otherwise."""

    @property
    def words(self) -> list[str]:
        return [
            *(f"base_model.{each}" for each in _BASE),
            *(f"stages.attention.{each}" for each in (*_STAGE, *self.own)),
            *(f"~stages.{name}" for name in ("embeddings", "instruct", "export")),
            *(f"workers={self.workers}", f"zero={self.zero}", "validation=[]", "retention=null", "tracking=none"),
        ]


_FULL = ("method=full", "modules_to_save=[]")
CASES = {
    case.name: case
    for case in (
        Case("LoRA on attention, ZeRO-2, 2 workers", 2, 2),
        Case("the same with checkpointing", 2, 2, ("resources.gradient_checkpointing=true",)),
        Case("the same on a base in nf4", 2, 2, ("quantization=nf4",)),
        Case("full fine-tuning, ZeRO-0, 1 worker", 1, 0, _FULL),
        Case("full fine-tuning, ZeRO-1, 2 workers", 2, 1, _FULL),
        Case("full fine-tuning, ZeRO-2, 2 workers", 2, 2, _FULL),
        Case("full fine-tuning, ZeRO-3, 2 workers", 2, 3, _FULL),
        Case("full fine-tuning, ZeRO-2, 2 workers, 8-bit AdamW", 2, 2, (*_FULL, "optimizer=adamw_8bit")),
    )
}


def compare(case: Case, folder: Path) -> tuple[float, float]:
    """Bytes of the worker that writes: as forecast and as measured. What is forecast is asked before anything is there."""
    words = [word for word in case.words if not (word.startswith("stages.attention.method.d") and "method=full" in case.own)]
    said = _output([str(ROOT / "launch" / "plan.py"), *words, "--workers", str(case.workers), "--json"], folder)
    (stage,) = json.loads(said)["stages"]
    _output([str(ROOT / "launch" / "run.py"), *words], folder)
    (made,) = folder.glob("runs/attention-*")
    return stage["memory"][str(case.zero)]["total"], read_json(made / "record.json")["results"]["peak_memory_bytes"]


def _output(command: Sequence[str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="", help="parts of names, with commas; all by default")
    wanted = parser.parse_args().cases.split(",")
    print("| | forecast, MB | measured, MB | off by |\n|---|---|---|---|")
    for case in (each for each in CASES.values() if any(part in each.name for part in wanted)):
        # How a stage is computed is no part of its name, so each case has a run root of its own.
        with tempfile.TemporaryDirectory(prefix="memory-") as folder:
            expected, held = compare(case, Path(folder))
            print(f"| {case.name} | {expected / 1e6:,.0f} | {held / 1e6:,.0f} | {expected / held - 1:+.1%} |", flush=True)


if __name__ == "__main__":
    main()
