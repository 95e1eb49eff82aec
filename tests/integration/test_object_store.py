"""An object store as the run root, end to end: a stage begins on one machine, is killed there, and ends on another."""

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.data.storage import ARRAYS
from orchestrator.run_root import run_root
from tests.faults.nodes import cluster_of, needs_namespaces
from tests.faults.running import SAVE_EVERY, WORDS, Running, Undisturbed, assert_nothing_was_lost, running
from tests.integration.command import run_command
from tests.unit.object_store import SECRET, Bucket, s3_bucket, s3_server

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        # A machine's mirror lies in its user's home.
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        yield s3_bucket()


@pytest.fixture
def words(bucket: Bucket) -> list[str]:
    return [*WORDS, f"run_root={bucket.url}"]


@pytest.fixture
def machines(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The homes of three machines, in each of which the mirror is `runs`."""
    return [machine(tmp_path / name, bucket, monkeypatch) for name in ("first", "second", "third")]


def machine(home: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Path:
    home.mkdir()
    with monkeypatch.context() as patched:
        patched.setenv("HOME", str(home))
        mirror = run_root(bucket.url).local
    assert mirror.is_relative_to(home)
    (home / "runs").mkdir()
    mirror.parent.mkdir(parents=True)
    mirror.symlink_to(home / "runs")
    return home


def test_a_stage_that_was_killed_on_one_machine_goes_on_on_another(
    bucket: Bucket, words: list[str], machines: list[Path], undisturbed: Undisturbed
) -> None:
    first, second, third = machines
    with running(words, first) as command:
        command.wait_for_step(2)
        assert_a_second_run_is_refused(command, words, third, bucket)
        command.wait_for_checkpoint(2 * SAVE_EVERY)
        kill(command)
    saved = newest_checkpoint(bucket)
    assert saved >= 2 * SAVE_EVERY
    with running(words, second) as command:
        assert command.wait() == 0, command.output
        assert f"goes on from step {saved}" in command.output
        assert f"results are kept at {bucket.url}; " in command.output
        assert [event["step"] for event in command.events("resumed")] == [saved]
        assert len(command.events("begin")) == 2
        assert_nothing_was_lost(command, undisturbed)
        assert_bucket_holds_what_is_done_alone(bucket, undisturbed)
    completed = run_command(words, third)
    assert completed.returncode == 0, completed.stderr
    assert "nothing to run: every stage that was asked for is done" in completed.stdout
    assert {path.name for path in (third / "runs").glob("*-*/**/*") if path.is_file()} == {"record.json"}
    assert_no_secrets(bucket, machines)


@needs_namespaces
def test_the_command_and_its_workers_need_share_nothing_but_the_store(
    words: list[str], machines: list[Path], undisturbed: Undisturbed
) -> None:
    home = machines[0]
    with (
        cluster_of(home, 2, covered=home / "runs") as nodes,
        running([*words, "cluster=address", f"cluster.address={nodes.address}"], home) as command,
    ):
        assert command.wait() == 0, command.output
        assert "step 30/30" in command.output
        assert_nothing_was_lost(command, undisturbed)
        assert not list(command.stage.glob("logs/rank-*.log")), "the ranks ran on the machine of the command"


def assert_a_second_run_is_refused(command: Running, words: list[str], home: Path, bucket: Bucket) -> None:
    # Stopped, so that it cannot finish meanwhile; its heart goes on beating on behalf of the command.
    stopped = command.rank_pid(0)
    os.kill(stopped, signal.SIGSTOP)
    second = run_command(words, home)
    os.kill(stopped, signal.SIGCONT)
    assert second.returncode == 2
    assert f"{bucket.url}/{command.stage.name}: is being run by " in second.stderr
    assert f"(process {command.process.pid}) since " in second.stderr


def kill(command: Running) -> None:
    """The command and all that it started, as if its machine were gone."""
    processes = psutil.Process(command.process.pid).children(recursive=True)
    os.killpg(command.process.pid, signal.SIGKILL)
    command.process.wait()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []


def newest_checkpoint(bucket: Bucket) -> int:
    """By its manifest."""
    manifests = [name.split("/") for name in bucket.names() if name.endswith("/manifest.json") and "/checkpoints/" in name]
    return max(int(step.removeprefix("step-")) for _, _, step, _ in manifests)


def assert_bucket_holds_what_is_done_alone(bucket: Bucket, undisturbed: Undisturbed) -> None:
    """Each stage's record, the files that it lists and its history, and the prepared data: no checkpoint, lease or part."""
    names = bucket.names()
    records = {name.partition("/")[0]: json.loads(bucket.read(name)) for name in names if name.endswith("/record.json")}
    assert sorted(record["stage"] for record in records.values()) == ["embeddings", "vocabulary"]
    expected = {f"{stage}/{name}" for stage, record in records.items() for name in ("record.json", *record["files"])}
    expected |= {f"{stage}/ledger.jsonl" for stage in records}
    expected |= {f"{stage}/metrics.jsonl" for stage in records if stage.startswith("embeddings-")}
    data = {name for name in names if name.startswith("data-")}
    assert len(data) == 3 * len(("data.json", *ARRAYS))
    assert names == expected | data
    (stage,) = (stage for stage in records if stage.startswith("embeddings-"))
    adapter = bucket.read(f"{stage}/adapter/adapter_model.safetensors")
    assert hashlib.sha256(adapter).hexdigest() == undisturbed.adapter
    steps = [json.loads(line)["step"] for line in bucket.read(f"{stage}/metrics.jsonl").splitlines()]
    assert steps == [step for step, _ in undisturbed.losses]
    assert json.loads(bucket.read(f"{stage}/ledger.jsonl").splitlines()[-1])["event"] == "finish"
    assert records[stage]["results"]["history"]["failures"] == {"driver_lost": 1}


def assert_no_secrets(bucket: Bucket, machines: list[Path]) -> None:
    local = [path.read_bytes() for home in machines for path in home.rglob("*") if path.is_file()]
    stored = [bucket.read(name) for name in bucket.names()]
    assert len(local) > 50
    assert not any(SECRET.encode() in content or b"AKIAIOSFODNN7EXAMPLE" in content for content in (*local, *stored))
