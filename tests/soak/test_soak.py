"""A run that is killed again and again learns what one learns that nothing happened to. `make soak` runs the long one."""

from pathlib import Path

import pytest

from orchestrator.store import sha256_file
from tests.faults.running import WORDS, Undisturbed, running
from tests.soak.soak import Soak, soak

pytestmark = [pytest.mark.ray]


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.timeout(600)
def test_a_run_that_is_killed_a_few_times(folder: Path, other_folder: Path) -> None:
    words = words_for(60)
    undisturbed = left_alone(words, other_folder)
    found = soak(words, folder, kills=4, seed=3)
    check(found, folder, undisturbed)
    assert sum(found.kills.values()) == 4


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_fifty_kills_in_two_hundred_steps(folder: Path, other_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = words_for(200)
    undisturbed = left_alone(words, other_folder)
    found = soak(words, folder, kills=50, seed=1)
    check(found, folder, undisturbed)
    with capsys.disabled():
        print(f"\n{found.table()}")
    assert sum(found.kills.values()) == 50


def words_for(steps: int) -> list[str]:
    return [word for word in WORDS if "embeddings.steps" not in word] + [f"stages.embeddings.steps={steps}"]


def left_alone(words: list[str], folder: Path) -> Undisturbed:
    """What the run learns that nothing happens to."""
    with running(words, folder) as command:
        assert command.wait(600) == 0, command.output
        return Undisturbed(command.losses(), sha256_file(command.stage / "adapter" / "adapter_model.safetensors"))


def check(found: Soak, folder: Path, undisturbed: Undisturbed) -> None:
    """Nothing committed is lost, nothing is left over, and what was learned is the same to the bit."""
    assert found.losses == undisturbed.losses
    (stage,) = (folder / "runs").glob("embeddings-*")
    assert sha256_file(stage / "adapter" / "adapter_model.safetensors") == undisturbed.adapter
    names = {path.name for path in stage.iterdir()}
    assert names == {"adapter", "ledger.jsonl", "logs", "metrics.jsonl", "record.json"}
    assert not list((folder / "runs").glob(".*"))
