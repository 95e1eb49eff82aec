"""The mirror, with the real wandb: what it is told, that it learns nothing else, and that its failures stop nothing."""

import http.server
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb

from orchestrator.schema.execution import WandbTracking
from orchestrator.tracking import RunDescription, start_mirror
from tests.wandb_reader import read_offline_runs

KEY = "0123456789abcdef0123456789abcdef01234567"
AUTO = WandbTracking(kind="wandb", project="laptop")
OFFLINE = WandbTracking(kind="wandb", project="laptop", mode="offline")
ONLINE = WandbTracking(kind="wandb", project="laptop", mode="online")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home without a login, an empty working directory, and a wandb that has read neither before."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NETRC", raising=False)
    for name in ("home", "working_directory", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "working_directory")
    yield tmp_path
    wandb.teardown()


@pytest.fixture
def run(tmp_path: Path) -> RunDescription:
    return RunDescription(
        id="instruct-0123456789ab",
        name="instruct",
        group="chinese_llama/4711",
        job_type="train",
        tags=("laptop", "stage3"),
        config={"trainable": {"lora": {"rank": 8, "targets": ["q_proj", "v_proj"]}}, "learning_rate": 2e-5, "text": None},
        folder=tmp_path / "stage",
    )


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Any:
    """Calls to it give our warnings so far."""
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("orchestrator.") and record.levelno >= logging.WARNING
    ]


def test_wandb_holds_what_it_was_told(run: RunDescription, warnings: Any) -> None:
    mirror = start_mirror(OFFLINE, run)
    for step in (10, 20, 30):
        mirror.log(step, {"loss": 1 / step, "num_tokens": step * 4096, "validation_loss": 2.5 if step == 20 else None})
    mirror.finish({"bits_per_character": 1.75}, exit_code=3)

    (written,) = read_offline_runs(run.folder)
    assert (written.id, written.name, written.project) == (run.id, run.name, "laptop")
    assert (written.group, written.job_type, set(written.tags)) == (run.group, run.job_type, set(run.tags))
    assert written.config == run.config
    assert written.history == [
        {"step": 10, "loss": 1 / 10, "num_tokens": 40960},
        {"step": 20, "loss": 1 / 20, "num_tokens": 81920, "validation_loss": 2.5},
        {"step": 30, "loss": 1 / 30, "num_tokens": 122880},
    ]
    assert written.step_metrics == {"*": "step"}
    assert written.summary["bits_per_character"] == 1.75
    assert written.exit_code == 3
    assert warnings() == []


def test_a_history_longer_than_a_block_is_read_back(run: RunDescription) -> None:
    mirror = start_mirror(OFFLINE, run)
    for step in range(300):
        mirror.log(step, {"loss": step / 7})
    mirror.finish({})
    (written,) = read_offline_runs(run.folder)
    assert written.history == [{"step": step, "loss": step / 7} for step in range(300)]
    (path,) = run.folder.glob("wandb/offline-run-*/run-*.wandb")
    assert path.stat().st_size > 2 * (1 << 15)


def test_a_later_attempt_has_the_same_id_and_its_own_steps(run: RunDescription) -> None:
    for step in (1, 7):
        mirror = start_mirror(OFFLINE, run)
        mirror.log(step, {"loss": 1.0})
        mirror.finish({})
    first, second = read_offline_runs(run.folder)
    assert first.id == second.id == run.id
    assert (first.history, second.history) == ([{"step": 1, "loss": 1.0}], [{"step": 7, "loss": 1.0}])


def test_a_stage_that_was_left_open_is_not_written_to(run: RunDescription, tmp_path: Path) -> None:
    start_mirror(OFFLINE, run)
    other = RunDescription("export", "export", "g", "export", (), {}, tmp_path / "other")
    mirror = start_mirror(OFFLINE, other)
    mirror.log(1, {"loss": 5.0})
    mirror.finish({})
    assert [written.history for written in read_offline_runs(other.folder)] == [[{"step": 1, "loss": 5.0}]]
    assert [written.history for written in read_offline_runs(run.folder)] == [[]]


def test_an_id_of_other_letters_is_made_one_that_wandb_takes(tmp_path: Path, warnings: Any) -> None:
    described = RunDescription("llama3.1/指令-ab12", "n", "g", "train", (), {}, tmp_path / "stage")
    start_mirror(OFFLINE, described).finish({})
    assert [written.id for written in read_offline_runs(described.folder)] == ["llama3-1----ab12"]
    assert warnings() == []


def test_nothing_is_printed_and_nothing_lies_in_the_working_directory(
    run: RunDescription, capfd: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    mirror = start_mirror(AUTO, run)
    mirror.log(1, {"loss": 1.0})
    mirror.finish({"loss": 1.0})
    assert capfd.readouterr() == ("", "")
    assert list((elsewhere / "working_directory").iterdir()) == []
    assert list((elsewhere / "temporary").rglob("*wandb/*run*")) == []


def test_no_secret_of_the_environment_and_no_command_line_is_written(
    run: RunDescription, monkeypatch: pytest.MonkeyPatch, elsewhere: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--password=argv_planted"])
    mirror = start_mirror(ONLINE, run)
    mirror.log(1, {"loss": 1.0})
    mirror.finish({})
    (written,) = read_offline_runs(run.folder)
    assert "environment" not in written.kinds
    contents = [path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()]
    assert any(b"laptop" in content for content in contents), "looked at nothing that wandb wrote"
    assert not [
        secret for secret in (KEY, "hf_planted", "argv_planted") if any(secret.encode() in content for content in contents)
    ]
    assert not list(run.folder.glob("wandb/*/files/*"))


def test_no_tracking_writes_nothing_and_does_not_import_wandb(run: RunDescription) -> None:
    program = (
        "import sys; from pathlib import Path; from orchestrator.tracking import RunDescription, start_mirror;"
        "from orchestrator.schema.execution import NoTracking;"
        f"run = RunDescription('a', 'a', 'g', 'j', (), {{}}, Path({str(run.folder)!r}));"
        "mirror = start_mirror(NoTracking(kind='none'), run); mirror.log(1, {'loss': 1.0}); mirror.finish({});"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert not run.folder.exists()


def test_the_environment_turns_wandb_off(run: RunDescription, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    mirror = start_mirror(ONLINE, run)
    mirror.log(1, {"loss": 1.0})
    mirror.finish({})
    assert not run.folder.exists()


def test_online_without_a_login_runs_offline_and_says_so(run: RunDescription, warnings: Any) -> None:
    start_mirror(ONLINE, run).finish({})
    assert [written.id for written in read_offline_runs(run.folder)] == [run.id]
    (warning,) = warnings()
    assert "WANDB_API_KEY" in warning


class Refusal(http.server.BaseHTTPRequestHandler):
    """A server that knows nothing; it counts who asks."""

    num_requests = 0

    def do_POST(self) -> None:
        Refusal.num_requests += 1
        self.send_error(404)

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the name is the base class's
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that refuses everything, to which wandb is directed."""
    Refusal.num_requests = 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{refusing.server_port}"
        monkeypatch.setenv("WANDB_BASE_URL", f"http://{address}")
        yield address
        refusing.shutdown()


@pytest.mark.parametrize("login", ["environment", "netrc"])
def test_auto_is_online_with_a_login_and_a_refusing_server_stops_nothing(
    login: str, server: str, run: RunDescription, warnings: Any, monkeypatch: pytest.MonkeyPatch, elsewhere: Path
) -> None:
    if login == "environment":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    else:
        (elsewhere / "home" / ".netrc").write_text(f"machine {server} login user password {KEY}\n")
    mirror = start_mirror(AUTO, run)
    mirror.log(1, {"loss": 1.0})
    mirror.finish({})
    assert Refusal.num_requests > 0
    (warning,) = warnings()
    assert warning.startswith("wandb did not start (CommError: ")


def test_auto_without_a_login_asks_no_server(server: str, run: RunDescription, warnings: Any) -> None:
    start_mirror(AUTO, run).finish({})
    assert [written.id for written in read_offline_runs(run.folder)] == [run.id]
    assert Refusal.num_requests == 0
    assert warnings() == []


@pytest.mark.parametrize(("name", "value"), [("WANDB_API_KEY", "short"), ("WANDB_MODE", "nonsense")])
def test_a_malformed_environment_is_one_warning(
    name: str,
    value: str,
    run: RunDescription,
    warnings: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    mirror = start_mirror(AUTO, run)
    mirror.log(1, {"loss": 1.0})
    mirror.finish({})
    (warning,) = warnings()
    assert warning.startswith("wandb did not start (")
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_cannot_be_made_is_one_warning(run: RunDescription, warnings: Any, elsewhere: Path) -> None:
    run.folder.write_text("a file where the folder should be")
    mirror = start_mirror(OFFLINE, run)
    mirror.log(1, {"loss": 1.0})
    mirror.finish({})
    (warning,) = warnings()
    assert warning.startswith("wandb did not start (NotADirectoryError: ")
    assert list((elsewhere / "temporary").rglob("*wandb*")) == [], "wandb went on elsewhere"


def test_a_killed_service_is_one_warning(run: RunDescription, warnings: Any, capfd: pytest.CaptureFixture[str]) -> None:
    mirror = start_mirror(OFFLINE, run)
    mirror.log(1, {"loss": 1.0})
    children = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True, check=True)
    (service,) = map(int, children.stdout.split())
    os.kill(service, signal.SIGKILL)
    os.waitid(os.P_PID, service, os.WEXITED | os.WNOWAIT)
    for step in range(2, 200):
        mirror.log(step, {"loss": 1.0})
    mirror.finish({"loss": 1.0})
    (warning,) = warnings()
    assert warning.startswith("wandb stopped at step ")
    assert capfd.readouterr() == ("", "")

    start_mirror(OFFLINE, replace(run, id="next", folder=run.folder / "next")).finish({})
    assert [written.id for written in read_offline_runs(run.folder / "next")] == ["next"]
