"""What a run root shows of its stages, in a folder and in a store, while somebody holds one and afterwards."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RecipeError
from orchestrator.lease import InFolder, InStore, held
from orchestrator.lease.held import LEASE_NAME
from orchestrator.plan.record import Record, commit
from orchestrator.run_root import RunRoot
from orchestrator.status import StageStatus, look
from orchestrator.tracking.ledger import LEDGER_NAME, Ledger
from orchestrator.tracking.metrics import METRICS_NAME, MetricsFile
from tests.shared_data import ROOT
from tests.unit.object_store import Bucket

COMMAND = "python launch/run.py stage=2"


@pytest.fixture
def root(tmp_path: Path) -> RunRoot:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "data-0123456789ab").mkdir()
    return RunRoot(tmp_path / "runs")


def begin(root: RunRoot, name: str, *events: tuple[str, dict[str, Any]], steps: int = 0) -> Path:
    folder = root.local / name
    folder.mkdir()
    with Ledger(folder / LEDGER_NAME) as ledger:
        ledger.write("begin", pid=1, host="here", command=COMMAND, pipeline="my_pipeline", step=0)
        for event, fields in events:
            ledger.write(event, **fields)
    if steps:
        with MetricsFile(folder / METRICS_NAME) as file:
            for step in range(1, steps + 1):
                file.write({"step": step, "time": time.time(), "loss": 5.0 - step / 10, "seconds": 1.0})
    return folder


def one(root: RunRoot) -> StageStatus:
    (found,) = look(root)
    return found


def test_a_stage_that_is_done(root: RunRoot) -> None:
    folder = begin(root, "attention-0123456789ab", ("attempt", {"steps": 3}), ("finish", {"step": 3}), steps=3)
    commit(folder, Record("attention", "train", "f" * 64, {}, {}, {"name": "my_pipeline"}, {"steps": 3}, {}))
    found = one(root)
    assert (found.state, found.pipeline, found.step, found.steps, found.holder) == ("done", "my_pipeline", 3, 3, "")
    assert found.loss == pytest.approx(4.7)
    assert time.time() - found.changed < 60


def test_a_stage_that_somebody_runs_and_how_far_it_is(root: RunRoot) -> None:
    folder = begin(root, "attention-0123456789ab", ("attempt", {"steps": 60}), steps=2)
    with held(InFolder(folder), COMMAND):
        found = one(root)
    assert (found.state, found.step, found.steps, found.pipeline) == ("running", 2, 60, "my_pipeline")
    assert f"(process {os.getpid()})" in found.holder
    assert COMMAND in found.holder
    assert one(root).state == "lost"


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([("stop", {"reason": "SIGINT", "step": 1})], "stopped"),
        ([("failure", {"cause": "error", "step": 1})], "failed"),
        ([("failure", {"cause": "hang", "step": 1}), ("attempt", {})], "lost"),
        ([], "lost"),
    ],
)
def test_a_stage_that_nobody_runs(root: RunRoot, events: list, state: str) -> None:
    begin(root, "attention-0123456789ab", *events)
    found = one(root)
    assert (found.state, found.command, found.step, found.loss) == (state, COMMAND, 0, None)


@pytest.mark.parametrize(("seconds", "state"), [(5, "running"), (500, "lost")])
def test_a_holder_on_another_machine_is_believed_as_long_as_it_renews_its_lease(
    root: RunRoot, seconds: float, state: str
) -> None:
    folder = begin(root, "attention-0123456789ab")
    with held(InFolder(folder), COMMAND):
        lease = json.loads((folder / LEASE_NAME).read_text(encoding="utf-8"))
    from_there = time.strftime("%Y-%m-%dT%H:%M:%S.000+00:00", time.gmtime(time.time() - seconds))
    (folder / LEASE_NAME).write_text(json.dumps(lease | {"boot_id": "other", "renewed": from_there}), encoding="utf-8")
    assert one(root).state == state


def test_what_was_changed_last_comes_last(root: RunRoot) -> None:
    for name in ("vocabulary-0123456789ab", "attention-0123456789ab", "embeddings-0123456789ab"):
        begin(root, name)
        time.sleep(0.01)
    assert [each.folder.partition("-")[0] for each in look(root)] == ["vocabulary", "attention", "embeddings"]


def test_a_store_shows_the_same_and_the_mirror_stays_as_it_is(tmp_path: Path) -> None:
    bucket = Bucket(f"folder://{tmp_path}/store/runs")
    root = RunRoot(tmp_path / "mirror", bucket.url)
    root.local.mkdir()
    name = "attention-0123456789ab"
    begin(root, name, ("attempt", {"steps": 60}), steps=2)
    for file in (LEDGER_NAME, METRICS_NAME):
        root.publish_file(f"{name}/{file}")
    elsewhere = RunRoot(tmp_path / "another_mirror", bucket.url)
    with held(InStore(root, name), COMMAND):
        found = one(elsewhere)
        assert (found.state, found.step, found.steps) == ("running", 2, 60)
    assert one(elsewhere).state == "lost"
    assert not elsewhere.local.exists()


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"run_root: .*nowhere is not there"):
        look(RunRoot(tmp_path / "nowhere"))


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "status.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def said(root: RunRoot) -> Callable[..., str]:
    def of(*words: str) -> str:
        done = run(str(root.local), *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return of


def test_the_command_says_it_in_lines(root: RunRoot, said: Callable[..., str]) -> None:
    assert said().startswith(f"{root.local}: no stage was begun there")
    begin(root, "attention-0123456789ab", ("attempt", {"steps": 60}), ("stop", {"reason": "SIGINT"}), steps=2)
    first, second = said().splitlines()
    assert first.startswith("attention-0123456789ab  stopped  step 2 of 60, loss 4.800, ")
    assert first.endswith(" ago  (my_pipeline)")
    assert second.strip() == f"to go on: {COMMAND}"
    (line,) = said("--json").splitlines()
    assert json.loads(line)["steps"] == 60


def test_the_command_names_a_root_that_is_not_there(tmp_path: Path) -> None:
    done = run(str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "nowhere is not there" in done.stderr
