"""What a base in few bits saves: the same LoRA stage on a base of 206 million weights, as it is and quantized.

    python -m tests.bench.quantized_memory [--layers 16] [--hidden 1024]

One worker on a CPU, micro-batches of one sequence of 128. Prints the table of the README: the base's weights as they lie in
memory, the most that the worker held (its libraries with it), tokens per second, and the loss after four steps.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from orchestrator.store import read_json
from orchestrator.tracking.metrics import read_metrics
from tests.shared_data import ROOT

_KINDS = ("bf16", "int8", "fp4", "nf4")
_BITS = {"bf16": 16.0, "int8": 8.0, "fp4": 4.127, "nf4": 4.127}
"""With the scales of blocks, themselves quantized, in the last two."""
_STAGE = "attention"
_SECONDS = 900


def words(layers: int, hidden: int, kind: str) -> list[str]:
    shape = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_layers": layers}
    shape |= {"num_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    own = {"modules_to_save": "[]", "steps": 4, "block_length": 128, "global_batch_size": 8, "resources.micro_batch_size": 1}
    own |= {} if kind == "bf16" else {"quantization": kind}
    others = ("embeddings", "instruct", "export")
    return [
        *(f"base_model.{name}={value}" for name, value in shape.items()),
        *(f"stages.{_STAGE}.{name}={value}" for name, value in own.items()),
        *(f"~stages.{name}" for name in others),
        *("validation=[]", "retention=null", "tracking=none", "workers=1"),
    ]


def measure(folder: Path, layers: int, hidden: int, kind: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "launch" / "run.py"), *words(layers, hidden, kind)]
    before = set(folder.glob(f"runs/{_STAGE}-*"))
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    (stage,) = set(folder.glob(f"runs/{_STAGE}-*")) - before
    rows = read_metrics(stage / "metrics.jsonl")
    results = read_json(stage / "record.json")["results"]
    tokens = (rows[-1]["tokens"] - rows[0]["tokens"]) / sum(row["seconds"] for row in rows[1:])
    return {"peak": results["peak_memory_bytes"], "tokens_per_second": tokens, "loss": rows[-1]["loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    options = parser.parse_args()
    weights = options.layers * options.hidden**2 * (4 + 3 * 11 / 4)
    print("| base | its blocks' weights, MB | peak of the worker, MB | tokens per second | loss |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="quantized-") as folder:
        for kind in _KINDS:
            found = measure(Path(folder), options.layers, options.hidden, kind)
            held = weights * _BITS[kind] / 8e6
            peak, rate = found["peak"] / 1e6, found["tokens_per_second"]
            print(f"| {kind} | {held:.0f} | {peak:,.0f} | {rate:.0f} | {found['loss']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
