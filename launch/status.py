"""Shows what is under a run root, while it runs and afterwards: python launch/status.py runs

    python launch/status.py [RUN_ROOT] [--json]

RUN_ROOT is a folder, `runs` by default, or a URL such as s3://bucket/runs.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

# The project also runs from a checkout that was never installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.errors import OrchestratorError
from orchestrator.lease.holder import rough_time
from orchestrator.report.console import Console
from orchestrator.run_root import run_root
from orchestrator.status import StageStatus, look


def main(arguments: Sequence[str]) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_root", nargs="?", default="runs")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each stage")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        root = run_root(options.run_root)
        found = look(root)
    except OrchestratorError as error:
        console.fail(str(error))
        return 2
    if options.json:
        for each in found:
            print(json.dumps(asdict(each), ensure_ascii=False))
        return 0
    if not found:
        console.say(f"{root.where()}: no stage was begun there")
    width = max((len(each.folder) for each in found), default=0)
    for each in found:
        print(f"{each.folder:<{width}}  {each.state:<7}  {_progress(each)}")
        if each.holder or each.state in ("stopped", "failed", "lost"):
            print(f"{'':<{width}}  {each.holder or f'to go on: {each.command}'}")
    return 0


def _progress(status: StageStatus) -> str:
    parts = []
    if status.steps or status.step:
        parts.append(f"step {status.step}" + (f" of {status.steps}" if status.steps else ""))
    if status.loss is not None:
        parts.append(f"loss {status.loss:.3f}")
    parts.append(f"{rough_time(time.time() - status.changed)} ago")
    return ", ".join(parts) + (f"  ({status.pipeline})" if status.pipeline else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
