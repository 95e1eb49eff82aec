"""Prepares text on a Ray cluster of its own: python -m tests.integration.prepare_alone FOLDER TOKENIZER FILE…"""

import sys
from pathlib import Path

from orchestrator.cluster.session import connected, run_task
from orchestrator.contents import find_data
from orchestrator.data.part import Preparation
from orchestrator.data.prepare import IDLE_CPUS
from orchestrator.run_root import RunRoot
from orchestrator.schema import LocalCluster
from orchestrator.stages.bodies import prepare_body
from orchestrator.stages.exchange import Exchange

PART_BYTES = 100_000


def preparation_of(tokenizer: str, files: list[str]) -> Preparation:
    """About fifty parts of the shared text."""
    return Preparation("next_token", Path(tokenizer), "text", find_data("text", files), 64, part_bytes=PART_BYTES)


if __name__ == "__main__":
    run_root, name_of_tokenizer, *names = sys.argv[1:]
    with connected(LocalCluster(kind="local")):
        preparation = preparation_of(name_of_tokenizer, names)
        run_task(prepare_body, Exchange.of(RunRoot(Path(run_root)), "stage", ()), preparation, 0, cpus=IDLE_CPUS)
