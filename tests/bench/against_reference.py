"""The project's own stages against the Hugging Face Trainer with PEFT and DeepSpeed, in turns, on one machine.

    python -m tests.bench.against_reference [--rounds 1] [--steps 6] [--stages embeddings,attention,instruct] [--out DIR]

The same base model (hidden 512, 8 layers, vocabulary 49,953), text, LoRA, block and batch; two workers on one core each,
ZeRO-2, bf16. Prints a table, and one JSON object of all that was measured; needs the reference and its data beside the
project.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.schema.recipe import RandomBase
from orchestrator.stages.random_base import write_random_base
from orchestrator.store import read_json
from orchestrator.tracking.ledger import read_ledger
from orchestrator.tracking.metrics import read_metrics
from orchestrator.vocabulary.extension import extend_tokenizer
from orchestrator.vocabulary.pieces import read_model
from tests.bench.result import Row, plot, table
from tests.shared_data import ROOT, SHARED

REFERENCE = SHARED.parent / "bench"
TIMED = ROOT / "tests" / "bench" / "timed_script.py"
TEXT, INSTRUCTIONS = SHARED / "text" / "luxun_train.jsonl", SHARED / "instructions" / "alpaca_zh_demo.json"
_BLOCK, _GLOBAL_BATCH, _MICRO_BATCH, _WORKERS = 512, 16, 4, 2
_SECONDS = 1200


@dataclass(frozen=True)
class Stage:
    """What both train."""

    name: str
    objective: str
    """As the reference calls it."""
    lora: str
    modules: str
    must: float
    """Tokens per second, in those of the reference."""
    micro_batch: int = _MICRO_BATCH
    """Of ours; the reference has _MICRO_BATCH always."""


STAGES = (
    Stage("embeddings", "pretrain", "", "embed_tokens", 1.25),
    Stage("attention", "pretrain", "q_proj,k_proj,v_proj,o_proj", "embed_tokens,lm_head", 1.25),
    # Two packed sequences hold as many instructions as four that are not.
    Stage("instruct", "instruct", "gate_proj,up_proj,down_proj", "embed_tokens,lm_head", 2.5, 2),
)
Figures = dict[str, float]
"""tokens_per_second, seconds_per_step, peak_mib, checkpoint_bytes, first_step_seconds; and of the reference
launch_seconds, until its process began."""


def write_tokenizer(folder: Path, merge: Literal["published", "reachable"], pad_token: str | None) -> Path:
    """LLaMA's tokenizer with the 20,000 Chinese pieces that were published, in `folder/tokenizer`."""
    tiny = RandomBase(
        kind="random",
        text=("none",),
        pieces=32_000,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_key_value_heads=1,
        max_positions=2048,
    )
    write_random_base(tiny, SHARED / "tokenizers" / "llama_32000.model", folder / "tiny", seed=1)
    chinese = read_model(SHARED / "tokenizers" / "chinese_sp_20000.model")
    extend_tokenizer(folder / "tiny", folder / "tokenizer", chinese, merge=merge, pad_token=pad_token)
    return folder / "tokenizer"


def make_inputs(folder: Path) -> None:
    """The base model and, for the reference, the text as a JSON list."""
    write_tokenizer(folder, "published", None)
    make = [sys.executable, str(REFERENCE / "make_base.py"), "--tokenizer", str(folder / "tokenizer")]
    subprocess.run([*make, "--out", str(folder / "base")], check=True, capture_output=True)
    records = [json.loads(line) for line in TEXT.read_text(encoding="utf-8").splitlines()]
    (folder / "text.json").write_text(json.dumps([{"text": record["text"]} for record in records]), encoding="utf-8")


def of_reference(folder: Path, stage: Stage, steps: int) -> Figures:
    data = INSTRUCTIONS if stage.objective == "instruct" else folder / "text.json"
    out = folder / f"reference_{stage.name}.json"
    arguments = {
        "model": folder / "base",
        "data": data,
        "objective": stage.objective,
        "targets": stage.lora,
        "save": stage.modules,
        "block": _BLOCK,
        "micro": _MICRO_BATCH,
        "accumulate": _GLOBAL_BATCH // _MICRO_BATCH // _WORKERS,
        "steps": steps,
        "out": out,
    }
    words = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(_WORKERS)]
    began, typed = folder / "began", time.time()
    # Its own clock starts in its process, and torchrun's start is a part of the command as Ray's is of ours.
    _run([*command, str(TIMED), str(began), str(REFERENCE / "reference_trainer.py"), *words], folder)
    found = json.loads(out.read_text(encoding="utf-8"))
    launched = float(began.read_text(encoding="ascii")) - typed
    return {
        "tokens_per_second": found["tokens_per_second"],
        "seconds_per_step": found["seconds_per_step"],
        "peak_mib": found["peak_rss_mib"],
        "checkpoint_bytes": found["checkpoint_bytes"],
        "first_step_seconds": launched + found["seconds_to_first_step"],
        "launch_seconds": launched,
    }


@dataclass(frozen=True)
class Trained:
    """What our command left of a stage."""

    rows: list[dict[str, Any]]
    """Of its metrics."""
    events: list[dict[str, Any]]
    """Of its ledger."""
    peak_bytes: int
    """The most that the worker held which writes the checkpoint, to the end of the stage."""

    def time_of(self, kind: str) -> float:
        """When something happened first, in seconds since the epoch."""
        return next(event["time"] for event in self.events if event["event"] == kind)

    @property
    def tokens_per_second(self) -> float:
        """Without the first step."""
        tokens = self.rows[-1]["tokens"] - self.rows[0]["tokens"]
        return tokens / sum(row["seconds"] for row in self.rows[1:])


def train(folder: Path, stages: Sequence[Stage], steps: int, seed: int, workers: int = _WORKERS) -> dict[str, Trained]:
    """By the command that anyone types; `seed` makes them stages that were not trained before."""
    settings: dict[str, object] = {
        "base_model": folder / "base",
        "text": TEXT,
        "instructions": INSTRUCTIONS,
        "validation": "[]",
        "retention": "null",
        "tracking": "none",
        "workers": workers,
        # However many there are, each has a core.
        "cluster.cpus": workers,
        "run_root": folder / "runs",
        "seed": seed,
    }
    for stage in stages:
        own = f"stages.{stage.name}"
        settings |= {
            f"{own}.block_length": _BLOCK,
            f"{own}.global_batch_size": _GLOBAL_BATCH,
            f"{own}.steps": steps,
            f"{own}.resources.micro_batch_size": stage.micro_batch,
            **({f"{own}.method.dropout": 0} if stage.lora else {}),
        }
    others = {"vocabulary", *(each.name for each in STAGES), "export"} - {stage.name for stage in stages}
    words = [f"{name}={value}" for name, value in settings.items()] + [f"~stages.{name}" for name in sorted(others)]
    before = set((folder / "runs").iterdir()) if (folder / "runs").is_dir() else set()
    _run([sys.executable, str(ROOT / "launch" / "run.py"), *words], folder)
    found = {}
    for stage in stages:
        (made,) = set((folder / "runs").glob(f"{stage.name}-*")) - before
        found[stage.name] = Trained(
            rows=read_metrics(made / "metrics.jsonl"),
            events=read_ledger(made / "ledger.jsonl"),
            peak_bytes=read_json(made / "record.json")["results"]["peak_memory_bytes"],
        )
    return found


def of_ours(folder: Path, stage: Stage, steps: int, seed: int) -> Figures:
    started = time.time()
    trained = train(folder, [stage], steps, seed)[stage.name]
    return {
        "tokens_per_second": trained.tokens_per_second,
        "seconds_per_step": statistics.median(row["seconds"] for row in trained.rows[1:]),
        "peak_mib": trained.peak_bytes / 2**20,
        "checkpoint_bytes": next(event["bytes"] for event in trained.events if event["event"] == "checkpoint"),
        "first_step_seconds": trained.time_of("first_step") - started,
    }


def between_stages(folder: Path) -> float:
    """Seconds from the end of a stage to the first step of the next, without that step."""
    trained = train(folder, STAGES[:2], 2, seed=2_000)
    first, second = (trained[stage.name] for stage in STAGES[:2])
    return second.time_of("first_step") - second.rows[0]["seconds"] - first.time_of("finish")


def of_two_workers(folder: Path, steps: int) -> float:
    """Tokens per second of two workers in those of one, each on a core, in the attention stage."""
    rates = [train(folder, [STAGES[1]], steps, 3_000 + n, n)[STAGES[1].name].tokens_per_second for n in (1, 2)]
    return rates[1] / rates[0]


def measure(folder: Path, stage: Stage, steps: int, rounds: int) -> dict[str, list[Figures]]:
    """Figures of each, round by round; who begins alternates, so that a drift of the machine cancels."""
    # Prepares the data, which is measured by itself.
    of_ours(folder, stage, 2, seed=1_000)
    found: dict[str, list[Figures]] = {"reference": [], "ours": []}
    for number in range(rounds):
        turns: dict[str, Callable[[], Figures]] = {
            "reference": lambda: of_reference(folder, stage, steps),
            "ours": lambda number=number: of_ours(folder, stage, steps, seed=number + 1),
        }
        for name in sorted(turns, reverse=number % 2 == 0):
            found[name].append(turns[name]())
    return found


def rows_of(stage: Stage, measured: dict[str, list[Figures]]) -> list[Row]:
    """Medians of both."""
    reference, ours = (_medians(measured[name]) for name in ("reference", "ours"))
    return [
        Row(f"{stage.name}: {name}", ours[figure] / unit, limit, bound, reference[figure] / unit)
        for figure, name, unit, bound, limit in (
            ("tokens_per_second", "tokens per second", 1, "≥", stage.must),
            ("peak_mib", "peak memory of a worker, MiB", 1, "≤", 0.7),
            ("checkpoint_bytes", "checkpoint to resume from, MB", 1e6, "≤", 0.8),
            ("first_step_seconds", "command to first step, s", 1, "≤", 1.2),
        )
    ]


def _medians(rounds: Sequence[Figures]) -> Figures:
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def _run(command: list[str], folder: Path) -> None:
    # Another ninja than this environment's would build DeepSpeed's op anew, and the next run of ours once more.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": path}
    log = folder / "last.log"
    with log.open("w", encoding="utf-8") as file:
        completed = subprocess.run(
            command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=_SECONDS, check=False
        )
    if completed.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{log.read_text(encoding='utf-8')[-4000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, help="folder for the table and a plot")
    parser.add_argument("--stages", default=",".join(stage.name for stage in STAGES))
    arguments = parser.parse_args()
    missing = [path for path in (REFERENCE / "reference_trainer.py", TEXT, INSTRUCTIONS) if not path.exists()]
    if missing:
        raise SystemExit(f"the benchmark needs {', '.join(map(str, missing))}")
    wanted = [stage for stage in STAGES if stage.name in arguments.stages.split(",")]
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        make_inputs(Path(name))
        measured = {stage.name: measure(Path(name), stage, arguments.steps, arguments.rounds) for stage in wanted}
        rows = [row for stage in wanted for row in rows_of(stage, measured[stage.name])]
        rows.append(Row("one stage to the next, s beyond its steps", between_stages(Path(name)), 10, "≤"))
        ratio = of_two_workers(Path(name), arguments.steps)
        rows.append(Row("two workers against one, tokens per second", ratio, 1.7, "≥"))
    print(table(rows))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "table.md").write_text(table(rows), encoding="utf-8")
        plot(rows, arguments.out / "ratios.svg")
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
