"""Preparing text at scale: tokens per second and core against the bare tokenizer in one process, and what memory it takes.

    python -m tests.bench.preparation [--megabytes 400]

Real text in documents of 2,000 characters, each with a number so that no two are alike; LLaMA's tokenizer extended by the
20,000 Chinese pieces that were published. Both sides read the same file; the bare tokenizer only tokenizes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.contents import find_data
from orchestrator.data.part import Preparation
from orchestrator.data.prepare import IDLE_CPUS, preparation_progress
from orchestrator.data.summary import read_summary
from orchestrator.run_root import RunRoot
from orchestrator.schema import LocalCluster
from tests.bench.against_reference import write_tokenizer
from tests.shared_data import SHARED

_DOCUMENT = 2_000
"""Characters."""
_BATCH = 128
"""Documents that the bare tokenizer gets at once."""
_BLOCK = 512
_LOOK_SECONDS = 0.5


@dataclass
class Watched:
    """What was seen while it ran: when how much was done, and the memory of its processes."""

    began: float
    seen: list[tuple[float, int, int]]
    """Seconds since the begin, tokens, and the resident bytes of the largest process."""

    @property
    def steady_rate(self) -> float:
        """Tokens per second from the first that were done to the last."""
        done = [(seconds, tokens) for seconds, tokens, _ in self.seen if tokens]
        (first, before), (last, after) = done[0], done[-1]
        return (after - before) / (last - first)

    def peak(self, part: slice) -> int:
        """The largest process, in bytes, in a part of the time in which something was done."""
        sizes = [size for _, tokens, size in self.seen if tokens]
        return max(sizes[part])


def write_corpus(path: Path, megabytes: int) -> None:
    lines = (SHARED / "text" / "luxun_train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    texts.append((SHARED / "text" / "english_wikipedia_30.txt").read_text(encoding="utf-8"))
    pieces = [text[at : at + _DOCUMENT] for text in texts for at in range(0, len(text), _DOCUMENT)]
    number = written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            line = json.dumps({"text": f"{number} {pieces[number % len(pieces)]}"}, ensure_ascii=False) + "\n"
            written += len(line.encode("utf-8"))
            number += 1
            file.write(line)


_BARE = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
texts = [json.loads(line)["text"] for line in open(sys.argv[2], encoding="utf-8")]
started, tokens = time.monotonic(), 0
for first in range(0, len(texts), int(sys.argv[3])):
    batch = texts[first : first + int(sys.argv[3])]
    tokens += sum(len(found.ids) for found in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
print(tokens / (time.monotonic() - started))
"""


def bare_rate(tokenizer: Path, corpus: Path) -> float:
    """Tokens per second of one process on one core, by the library's fastest call."""
    command = [sys.executable, "-c", _BARE, str(tokenizer / "tokenizer.json"), str(corpus), str(_BATCH)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def prepare_watched(preparation: Preparation, folder: Path) -> tuple[float, Watched]:
    """Seconds from the call on a cluster that runs to the folder that is whole, and what was seen."""
    from orchestrator.cluster.session import connected, run_task  # noqa: PLC0415
    from orchestrator.stages.bodies import prepare_body  # noqa: PLC0415
    from orchestrator.stages.exchange import Exchange  # noqa: PLC0415

    over = threading.Event()
    with connected(LocalCluster(kind="local")):
        watched = Watched(time.monotonic(), [])

        def watch() -> None:
            while not over.wait(_LOOK_SECONDS):
                progress = preparation_progress(preparation, folder)
                size = max(_resident_bytes(), default=0)
                watched.seen.append((time.monotonic() - watched.began, progress.tokens if progress else 0, size))

        watcher = threading.Thread(target=watch)
        watcher.start()
        run_task(prepare_body, Exchange.of(RunRoot(folder), "stage", ()), preparation, 0, cpus=IDLE_CPUS)
        seconds = time.monotonic() - watched.began
        over.set()
        watcher.join()
    return seconds, watched


def _resident_bytes() -> Iterator[int]:
    """Of the processes that prepare, without the pages that they share with Ray's object store."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            name = (entry / "cmdline").read_bytes()
            if name.startswith((b"ray::MapWorker", b"ray::prepare_body")):
                fields = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines())
                yield int(fields["RssAnon"].split()[0]) * 1024
        except (FileNotFoundError, ProcessLookupError):
            continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=400)
    arguments = parser.parse_args()
    if not SHARED.is_dir():
        raise SystemExit(f"the benchmark needs {SHARED}")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        tokenizer, corpus, sample = (
            write_tokenizer(folder, "reachable", "<pad>"),
            folder / "corpus.jsonl",
            folder / "sample.jsonl",
        )
        write_corpus(corpus, arguments.megabytes)
        write_corpus(sample, min(arguments.megabytes, 100))
        cores = len(os.sched_getaffinity(0))
        before = bare_rate(tokenizer, sample)
        preparation = Preparation("next_token", tokenizer, "text", find_data("text", [str(corpus)]), _BLOCK)
        seconds, watched = prepare_watched(preparation, folder / "runs")
        after = bare_rate(tokenizer, sample)
        (made,) = (folder / "runs").glob("data-*")
        summary = read_summary(made)
        assert summary
    bare, half = (before + after) / 2, len([1 for _, tokens, _ in watched.seen if tokens]) // 2
    steady, whole = watched.steady_rate / cores, summary.tokens / seconds / cores
    print(f"{arguments.megabytes:,} MB, {summary}")
    print("| preparation | bare tokenizer | ours | ratio | must |\n|---|---|---|---|---|")
    print(f"| tokens per second and core, once it runs | {bare:,.0f} | {steady:,.0f} | {steady / bare:.2f} | ≥ 0.7 |")
    print(f"| the same, start and end included ({seconds:.0f} s) | {bare:,.0f} | {whole:,.0f} | {whole / bare:.2f} | |")
    print(
        f"| memory of the largest process, first and second half, MiB | | {watched.peak(slice(0, half)) / 2**20:,.0f}, "
        f"{watched.peak(slice(half, None)) / 2**20:,.0f} | | < 1,024 |"
    )


if __name__ == "__main__":
    main()
