"""A checkpoint is read back as it was written, or the one before is, with the reason."""

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint.generations import Draft, discard_after, newest_good, prune
from orchestrator.errors import StorageError
from orchestrator.model.tensor_stream import TensorStream
from orchestrator.plan.checkpoints import CHECKPOINTS_NAME, checkpoint_folder, checkpoint_steps, replaced_folder
from orchestrator.store import sha256_file
from tests.unit.checkpoint.dying import FINGERPRINT, contents, version_of, write_generation


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The memory of hashes, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def stage_folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "stage"


def write(stage_folder: Path, *steps: int) -> None:
    """Generations whose version is their step."""
    for step in steps:
        write_generation(stage_folder, FINGERPRINT, step, *contents(version=step))


def names(stage_folder: Path) -> list[str]:
    return sorted(path.name for path in (stage_folder / CHECKPOINTS_NAME).iterdir())


def test_what_is_read_back_is_what_was_written(stage_folder: Path) -> None:
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "master": torch.tensor([float("nan"), float("-inf"), 1e-45, -0.0]),
        "count": torch.tensor(7),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "flags": torch.tensor([[True], [False]]),
        "empty": torch.empty(0, 4),
        "名": torch.tensor([2**62, -1]),
    }
    state = {"step": 40, "名": [1, 2.5, None, True], "nested": {"a": "b"}}
    size = write_generation(stage_folder, FINGERPRINT, 40, tensors, state)
    checkpoint, damages = newest_good(stage_folder, FINGERPRINT)
    assert damages == []
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state, checkpoint.bytes) == (40, state, size)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()
    }
    for name, tensor in tensors.items():
        # As bytes, since NaN differs from itself and 0 equals -0.
        written, read = (found.reshape(-1).view(torch.uint8) for found in (tensor, checkpoint.tensors[name]))
        assert torch.equal(written, read)


def test_a_generation_holds_three_files_and_says_what_they_must_be(stage_folder: Path) -> None:
    size = write_generation(stage_folder, FINGERPRINT, 40, *contents(version=1))
    folder = stage_folder / "checkpoints" / "step-00000040"
    assert names(stage_folder) == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "state.json", "tensors.safetensors"]
    files = {name: (folder / name).read_bytes() for name in ("state.json", "tensors.safetensors")}
    assert json.loads((folder / "manifest.json").read_bytes()) == {
        "format": 1,
        "fingerprint": FINGERPRINT,
        "step": 40,
        "files": {name: {"sha256": sha256(found).hexdigest(), "size": len(found)} for name, found in files.items()},
    }
    assert size == sum(len(found) for found in files.values())
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / "state.json").stat().st_mode}


def test_there_may_be_no_tensors(stage_folder: Path) -> None:
    write_generation(stage_folder, FINGERPRINT, 1, {}, {})
    checkpoint, damages = newest_good(stage_folder, FINGERPRINT)
    assert checkpoint is not None
    assert (checkpoint.tensors, checkpoint.state, damages) == ({}, {}, [])


def test_a_stage_without_checkpoints_has_none(stage_folder: Path) -> None:
    assert checkpoint_steps(stage_folder) == []
    assert newest_good(stage_folder, FINGERPRINT) == (None, [])
    stage_folder.mkdir(parents=True)
    (stage_folder / CHECKPOINTS_NAME).write_text("a file where the folder should be")
    assert checkpoint_steps(stage_folder) == []
    assert newest_good(stage_folder, FINGERPRINT) == (None, [])


def test_steps_are_those_of_rightly_named_folders_with_a_manifest(stage_folder: Path) -> None:
    write(stage_folder, 400_000_000, 7, 20)
    folder = stage_folder / CHECKPOINTS_NAME
    for name in ("step-30", "step-000000040", "step-00000050x", ".step-00000060.partial", ".step-00000070.removed", "other"):
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text("{}")
    checkpoint_folder(stage_folder, 80).mkdir()
    checkpoint_folder(stage_folder, 90).write_text("a file")
    assert checkpoint_steps(stage_folder) == [7, 20, 400_000_000]


def in_tensors(change: Callable[[bytes], bytes], name: str = "tensors.safetensors") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        before = path.stat()
        path.write_bytes(change(path.read_bytes()))
        # A disk that loses a bit does not say when.
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return damage


def in_manifest(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))

    return damage


def lead_out_of_the_folder(folder: Path) -> None:
    """A manifest that is true of files elsewhere."""
    (folder / "state.json").rename(folder.parent / "state.json")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"]["../state.json"] = manifest["files"].pop("state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGES = {
    "a flipped bit": (
        in_tensors(lambda content: content[:-100] + bytes([content[-100] ^ 4]) + content[-99:]),
        "tensors.safetensors is not what was written (its sha256 differs)",
    ),
    "a flipped bit in the header": (
        in_tensors(lambda content: bytes([content[0] ^ 128]) + content[1:]),
        "tensors.safetensors is not what was written (its sha256 differs)",
    ),
    "other numbers": (
        in_tensors(lambda content: content.replace(b"40", b"60"), "state.json"),
        "state.json is not what was written (its sha256 differs)",
    ),
    "truncated": (in_tensors(lambda content: content[:50]), "tensors.safetensors is truncated: 50 bytes of 12"),
    "empty": (in_tensors(lambda content: b"", "state.json"), "state.json is truncated: 0 bytes of "),
    "too long": (in_tensors(lambda content: content * 2), "tensors.safetensors is too long: "),
    "no tensors": (lambda folder: (folder / "tensors.safetensors").unlink(), "tensors.safetensors is missing"),
    "no state": (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "garbage": (in_tensors(lambda content: b"\xff\x00{", "manifest.json"), "manifest.json is not JSON"),
    "an empty manifest": (in_tensors(lambda content: b"", "manifest.json"), "manifest.json is not JSON"),
    "a list": (in_tensors(lambda content: b"[]", "manifest.json"), "manifest.json does not say what it should"),
    "no files": (in_manifest(files=None), "manifest.json does not say what it should"),
    "no sizes": (in_manifest(files={"state.json": {"sha256": "0"}}), "manifest.json does not say what it should"),
    "another format": (in_manifest(format=2), "manifest.json is of format 2; this version reads format 1"),
    "another stage": (
        in_manifest(fingerprint="e" * 64),
        f"it belongs to another stage (its fingerprint is {'e' * 64})",
    ),
    "another step": (in_manifest(step=20), "it is the checkpoint of step 20, under another's name"),
    "a file too few": (in_manifest(files={}), "manifest.json lists nothing instead of state.json, tensors.safetensors"),
    "a path": (lead_out_of_the_folder, "manifest.json lists ../state.json, tensors.safetensors instead of state.json"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_generation_is_told_and_the_one_before_is_taken(stage_folder: Path, kind: str) -> None:
    damage, reason = DAMAGES[kind]
    write(stage_folder, 20, 40)
    for path in checkpoint_folder(stage_folder, 40).iterdir():
        sha256_file(path)
    assert version_of(newest_good(stage_folder, FINGERPRINT)[0]) == 40
    damage(checkpoint_folder(stage_folder, 40))
    checkpoint, (told,) = newest_good(stage_folder, FINGERPRINT)
    assert version_of(checkpoint) == 20
    assert told.startswith(f"step 40: {reason}")


def test_without_a_good_one_every_damage_is_told(stage_folder: Path) -> None:
    write(stage_folder, 20, 40)
    in_manifest(format=2)(checkpoint_folder(stage_folder, 20))
    in_manifest(step=1)(checkpoint_folder(stage_folder, 40))
    checkpoint, damages = newest_good(stage_folder, FINGERPRINT)
    assert checkpoint is None
    assert [told.split(":")[0] for told in damages] == ["step 40", "step 20"]


def test_what_the_disk_cannot_give_back_is_a_damage(stage_folder: Path) -> None:
    write(stage_folder, 20, 40)
    manifest = checkpoint_folder(stage_folder, 40) / "manifest.json"
    manifest.unlink()
    # Reading from its start is an I/O error, as of a bad sector.
    manifest.symlink_to("/proc/self/mem")
    checkpoint, (told,) = newest_good(stage_folder, FINGERPRINT)
    assert version_of(checkpoint) == 20
    assert told.startswith("step 40: the disk has lost a part of it ([Errno 5] Input/output error")


def test_what_cannot_be_asked_is_not_taken_for_damaged(stage_folder: Path) -> None:
    write(stage_folder, 20, 40)
    manifest = checkpoint_folder(stage_folder, 40) / "manifest.json"
    manifest.unlink()
    # A file that nobody may read, not even root.
    manifest.symlink_to("/proc/self/clear_refs")
    with pytest.raises(StorageError, match=r"step-00000040 cannot be read \(.*\); see to it"):
        newest_good(stage_folder, FINGERPRINT)


def test_a_large_file_is_hashed_and_not_remembered(stage_folder: Path, memory: Path) -> None:
    write_generation(stage_folder, FINGERPRINT, 20, *contents(version=20, num_values=500_000))
    assert version_of(newest_good(stage_folder, FINGERPRINT)[0]) == 20
    assert not memory.exists()


def test_tensors_may_come_in_parts_and_in_any_order(stage_folder: Path) -> None:
    tensors = {"a": torch.arange(10.0).view(2, 5), "b": torch.arange(7, dtype=torch.uint8)}
    rows = {name: tensor.view(-1) for name, tensor in tensors.items()}
    parts = [("a", 6, rows["a"][6:]), ("b", 0, rows["b"][:3]), ("a", 0, rows["a"][:6]), ("b", 3, rows["b"][3:])]
    layout = {name: tensor.to("meta") for name, tensor in tensors.items()}
    Draft(stage_folder, 20, TensorStream(layout, parts)).commit(FINGERPRINT, {})
    checkpoint, _ = newest_good(stage_folder, FINGERPRINT)
    assert checkpoint is not None
    assert checkpoint.tensors.keys() == tensors.keys()
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in tensors.items())


def test_a_step_that_is_written_again_takes_the_place_of_the_first(stage_folder: Path) -> None:
    write(stage_folder, 20, 40)
    write_generation(stage_folder, FINGERPRINT, 40, *contents(version=41))
    assert version_of(newest_good(stage_folder, FINGERPRINT)[0]) == 41
    prune(stage_folder, keep=2)
    assert names(stage_folder) == ["step-00000020", "step-00000040"]


def test_a_write_that_fails_leaves_the_one_before_and_nothing_beside_it(stage_folder: Path) -> None:
    write(stage_folder, 40)
    tensors, _ = contents(version=41)
    with pytest.raises(TypeError, match="JSON"):
        write_generation(stage_folder, FINGERPRINT, 40, tensors, {"a": object()})
    assert names(stage_folder) == ["step-00000040"]
    assert version_of(newest_good(stage_folder, FINGERPRINT)[0]) == 40


def test_one_that_was_being_replaced_counts_and_gets_its_name_back(stage_folder: Path) -> None:
    write(stage_folder, 20, 40)
    checkpoint_folder(stage_folder, 40).rename(replaced_folder(stage_folder, 40))
    assert checkpoint_steps(stage_folder) == [20, 40]
    assert version_of(newest_good(stage_folder, FINGERPRINT)[0]) == 40
    prune(stage_folder, keep=1)
    assert names(stage_folder) == ["step-00000040"]
    assert version_of(newest_good(stage_folder, FINGERPRINT)[0]) == 40


def test_the_newest_stay_and_leftovers_go(stage_folder: Path) -> None:
    write(stage_folder, 1, 2, 3, 4)
    folder = stage_folder / CHECKPOINTS_NAME
    for leftover in (".step-00000005.partial", ".step-00000003.removed", ".step-00000003.replaced", "step-00000006"):
        (folder / leftover).mkdir()
        (folder / leftover / "state.json").write_text("{}")
    for other in (".nfs0001", "notes.txt"):
        (folder / other).write_text("not ours")
    prune(stage_folder, keep=2)
    assert names(stage_folder) == [".nfs0001", "notes.txt", "step-00000003", "step-00000004"]
    assert version_of(newest_good(stage_folder, FINGERPRINT)[0]) == 4


def test_what_a_dead_process_left_makes_room_before_the_next_is_written(stage_folder: Path) -> None:
    partial = stage_folder / CHECKPOINTS_NAME / ".step-00000005.partial"
    partial.mkdir(parents=True)
    with pytest.raises(TypeError):
        write_generation(stage_folder, FINGERPRINT, 7, {}, {"a": object()})
    assert names(stage_folder) == []


def test_what_is_newer_is_discarded(stage_folder: Path) -> None:
    write(stage_folder, 20, 40, 60)
    in_manifest(format=2)(checkpoint_folder(stage_folder, 40))
    (checkpoint_folder(stage_folder, 60) / "manifest.json").unlink()
    discard_after(stage_folder, 20)
    assert names(stage_folder) == ["step-00000020"]
    discard_after(stage_folder, 0)
    assert names(stage_folder) == []
    discard_after(stage_folder.with_name("none"), 0)
