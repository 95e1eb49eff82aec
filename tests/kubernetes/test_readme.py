"""The k8s README is followed: its commands are run as they stand, against the small API server."""

import re
import threading
import time
from pathlib import Path

from tests.kubernetes.api_server import ApiServer
from tests.kubernetes.kubectl import run
from tests.shared_data import ROOT

README = (ROOT / "k8s" / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def operate(server: ApiServer, over: threading.Event) -> None:
    """Every job that comes finishes at once, and says so."""
    while not over.wait(0.05):
        for job in server.of_kind("rayjobs"):
            name = job["metadata"]["name"]
            if not job.get("status"):
                labels = job["spec"]["submitterPodTemplate"]["metadata"]["labels"]
                server.add_pod(f"{name}-abcde", {**labels, "job-name": name})
                server.logs[f"{name}-abcde"].append(f"the log of {name}")
                server.end_pod(f"{name}-abcde")
                server.set_status(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")


def test_every_command_of_the_readme_works(bare_server: ApiServer, kubeconfig: Path) -> None:
    server = bare_server
    assert len(commands()) >= 15
    over = threading.Event()
    operator = threading.Thread(target=operate, args=(server, over), daemon=True)
    operator.start()
    outputs = {}
    try:
        for command in commands():
            completed = run(["bash", "-o", "pipefail", "-c", command], kubeconfig)
            assert completed.returncode == 0, f"{command}\n{completed.stdout}{completed.stderr}"
            outputs[command] = completed.stdout + completed.stderr
            time.sleep(0.2)
    finally:
        over.set()
        operator.join(10)
    assert any("Complete, succeeded" in output for command, output in outputs.items() if "action=status" in command)
    assert any("the log of chinese-llama-2" in output for command, output in outputs.items() if "kubectl logs" in command)
    assert server.of_kind("rayjobs") == []
    secrets = {each["metadata"]["name"] for each in server.of_kind("secrets")}
    assert secrets == {"wandb", "object-store"}


def test_every_file_and_option_that_it_names_exists() -> None:
    named = set(re.findall(r"k8s/[\w./-]+|orchestrator/[\w/]+\.py|\w+\.md", README))
    assert len(named) >= 8
    paths = [name if "/" in name else f"k8s/{name}" for name in named]
    assert [path for path in paths if not (ROOT / path).exists()] == []
