"""What is secret in the environment is written nowhere, and nothing listens beyond this machine: a real run, watched."""

import ipaddress
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.integration.command import command_environment, run_command
from tests.shared_data import ROOT
from tests.wandb_reader import read_offline_runs

SECRETS = {
    "WANDB_API_KEY": "5ec2e7" * 6 + "5ec2",
    "HF_TOKEN": "hf_planted5ec2e7",
    "AWS_SECRET_ACCESS_KEY": "planted/5ec2e7+aws",
    "RAY_AUTH_TOKEN": "planted5ec2e7ray",
    "MY_SERVICE_TOKEN": "planted5ec2e7service",
}
_LOOK_SECONDS = 0.3
_MOST_SECONDS = 300


@dataclass
class Watched:
    """A run that has ended, and what was seen while it went on."""

    folder: Path
    """The home and working directory of the command, which also has its output and the system's temporary folder."""
    ray_files: Path
    """Links to all files of Ray's folder, which Ray's end removes."""
    command_lines: set[str] = field(default_factory=set)
    listening: set[tuple[str, str]] = field(default_factory=set)
    """Process and address."""
    informed: set[str] = field(default_factory=set)
    """The processes that had the secrets in their environment."""
    leases: dict[str, bytes] = field(default_factory=dict)
    """What lease.json held while a stage ran, by path."""

    def look(self, command: psutil.Process) -> None:
        # Processes and files come and go while they are looked at.
        with suppress(psutil.NoSuchProcess):
            for process in (command, *command.children(recursive=True)):
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                    self._look_at(process)
        for path in self.folder.glob("runs/*/lease.json"):
            with suppress(FileNotFoundError):
                self.leases[str(path)] = path.read_bytes()
        with suppress(FileNotFoundError):
            self._keep_ray_files(command.pid)

    def _keep_ray_files(self, pid: int) -> None:
        for path in Path("/tmp").glob(f"ray-{pid}-*/**/*"):
            with suppress(FileNotFoundError, FileExistsError):
                if path.is_file() and not path.is_symlink():
                    os.link(path, self.ray_files / f"{path.stat().st_ino}-{path.name}")

    def _look_at(self, process: psutil.Process) -> None:
        line = " ".join(process.cmdline())
        self.command_lines.add(line)
        environment = process.environ()
        if all(environment.get(name) == secret for name, secret in SECRETS.items()):
            self.informed.add(line)
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                self.listening.add((line[:80], connection.laddr.ip))

    def contents(self) -> dict[str, bytes]:
        """All that was written, by path."""
        paths = [path for place in (self.folder, self.ray_files) for path in place.rglob("*") if path.is_file()]
        return {str(path): path.read_bytes() for path in paths} | self.leases


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "temporary").mkdir()
    environment = command_environment(folder) | SECRETS | {"WANDB_MODE": "offline", "TMPDIR": str(folder / "temporary")}
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    words = ["stage=1", "stages.embeddings.steps=2", "tracking=wandb", "workers=2"]
    # Beside Ray's own folder, since a link cannot lead to another disk.
    with tempfile.TemporaryDirectory(prefix="kept-", dir="/tmp") as kept, (folder / "output.txt").open("wb") as output:
        run = Watched(folder, Path(kept))
        command = subprocess.Popen(
            [sys.executable, str(ROOT / "launch" / "run.py"), *words],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
        )
        try:
            deadline = time.monotonic() + _MOST_SECONDS
            while command.poll() is None and time.monotonic() < deadline:
                run.look(psutil.Process(command.pid))
                time.sleep(_LOOK_SECONDS)
        finally:
            command.kill()
        assert command.wait() == 0, (folder / "output.txt").read_text(encoding="utf-8")
        yield run


@pytest.mark.ray
@pytest.mark.slow
def test_the_run_is_seen_whole(watched: Watched) -> None:
    """Without this the other tests would show nothing."""
    assert any("orchestrator.cluster.forkserver" in line for line in watched.informed)
    contents = watched.contents()
    names = {path.rpartition("/")[2] for path in contents}
    assert names >= {"record.json", "ledger.jsonl", "lease.json", "manifest.json", "rank-1.log", "output.txt", "debug.log"}
    assert any(name.endswith("raylet.out") for name in names)
    assert any(path.startswith(str(watched.folder / "cache" / "orchestrator" / "sha256")) for path in contents)
    assert any(b"stages.embeddings.steps=2" in content for content in contents.values())
    (attempt,) = read_offline_runs(next(watched.folder.glob("runs/embeddings-*")))
    assert attempt.config["recipe"]["name"] == "chinese_llama"


@pytest.mark.ray
@pytest.mark.slow
def test_no_secret_is_written_anywhere(watched: Watched) -> None:
    contents = watched.contents()
    assert len(contents) > 60
    found = [
        (name, path) for path, content in contents.items() for name, secret in SECRETS.items() if secret.encode() in content
    ]
    assert found == []


@pytest.mark.ray
@pytest.mark.slow
def test_no_secret_is_on_a_command_line(watched: Watched) -> None:
    assert len(watched.command_lines) > 8
    assert [line for line in watched.command_lines if any(secret in line for secret in SECRETS.values())] == []


@pytest.mark.ray
@pytest.mark.slow
def test_nothing_listens_beyond_this_machine(watched: Watched) -> None:
    """The driver, gcs_server, raylet, Ray's two agents, each Ray worker and each rank listen.

    Left to itself, Ray listens on every network of the machine, without a dashboard, too: its DashboardAgent has the job
    server's HTTP on port 52365 of the node's address, RuntimeEnvAgent its HTTP, and all others gRPC on [::] and
    0.0.0.0. So does torch's TCPStore, where the ranks meet. Told that the node is 127.0.0.1, all of them stay there.
    """
    assert len({process for process, _ in watched.listening}) > 6
    beyond = [(process, address) for process, address in sorted(watched.listening) if not is_loopback(address)]
    assert beyond == []


def test_credentials_in_a_url_are_refused_and_not_repeated(tmp_path: Path) -> None:
    secret = "planted5ec2e7"
    words = [f"text=https://user:{secret}@127.0.0.1:1/corpus.jsonl", f"validation='s3://bucket/text.jsonl?token={secret}'"]
    completed = run_command(words, tmp_path, seconds=60)
    assert completed.returncode == 2
    assert "text: a URL in it carries a password, key or token" in completed.stderr
    assert "validation: a URL in it carries a password, key or token" in completed.stderr
    assert secret not in completed.stdout + completed.stderr
    assert not (tmp_path / "runs").exists()


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return ((isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped) or parsed).is_loopback
