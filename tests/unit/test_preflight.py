"""What nodes say of themselves, against what a recipe will take."""

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cluster.node_facts import Facts
from orchestrator.cluster.sizing import Size
from orchestrator.compose import compose
from orchestrator.plan.inputs import find_inputs
from orchestrator.plan.plan import make_plan
from orchestrator.preflight import Planned, look_here, look_there
from orchestrator.report.console import Console
from orchestrator.run_root import run_root
from orchestrator.stage_kinds import Run

PLAIN = Facts(cpus=8, memory_bytes=32_000_000_000, disk_bytes=500_000_000_000)
EQUIPPED = replace(PLAIN, devices=("NVIDIA H100",), device_bytes=80 * 2**30, driver="570.1", nccl="2.28.3", counted=1)
ON_CPUS, ON_GPUS = Size((2,), 0, 1), Size((2,), 1, 1)


def planned(tmp_path: Path, *words: str) -> Planned:
    recipe = compose(["stage=2", f"run_root={tmp_path}/runs", *words])
    root = run_root(recipe.run_root)
    run = Run(recipe, find_inputs(recipe), root, Console(), "python launch/run.py stage=2")
    return [(run, make_plan(recipe, run.inputs.contents, root.local))]


def test_what_a_worker_will_hold_is_held_against_what_there_is(tmp_path: Path) -> None:
    found = look_there(planned(tmp_path), ON_CPUS, {"here": PLAIN})
    assert [what for what, _ in found.checked] == ["node here", "memory of embeddings", "memory of attention"]
    assert (found.warnings, found.problems) == ([], [])
    small = replace(PLAIN, memory_bytes=500_000_000)
    warnings = look_there(planned(tmp_path), ON_CPUS, {"here": small}).warnings
    assert len(warnings) == 2
    assert warnings[0].startswith("stages.embeddings: a worker will hold about 6")
    assert "there are 250.0 MB for each; lower resources.micro_batch_size" in warnings[0]


def test_a_head_without_a_device_is_no_limit_and_no_fault(tmp_path: Path) -> None:
    head = replace(PLAIN, memory_bytes=100_000_000)
    found = look_there(planned(tmp_path), ON_GPUS, {"head": head, "node": EQUIPPED})
    assert (found.warnings, found.problems) == ([], [])
    assert "of 85.9 GB" in dict(found.checked)["memory of attention"]


def test_devices_that_ray_counts_and_the_driver_does_not_show_are_named(tmp_path: Path) -> None:
    found = look_there(planned(tmp_path), ON_GPUS, {"node": replace(PLAIN, counted=8)})
    assert found.warnings == ["node node: Ray counts 8 GPUs, and nvidia-smi shows none; see to the driver"]


def test_nodes_that_gave_no_answer_are_not_judged(tmp_path: Path) -> None:
    found = look_there(planned(tmp_path), ON_CPUS, {})
    assert (found.checked, found.warnings) == ([], [])


def test_what_several_recipes_share_takes_its_room_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    one = planned(tmp_path)
    other = planned(tmp_path, "stages.attention.learning_rate=2e-3")
    rooms = [dict(look_here(each).checked)["disk"] for each in (one, [*one, *one], [*one, *other])]
    assert rooms[0].partition(" of ")[2] == rooms[1].partition(" of ")[2]
    assert rooms[0].partition(" of ")[2] != rooms[2].partition(" of ")[2]
