"""An adapter folder holds what its manifest lists, and nothing that the manifest lists lies elsewhere."""

import json
from pathlib import Path

import pytest

from orchestrator.checkpoint.manifest import MANIFEST_NAME, Origin, check_files, read_manifest, write_manifest
from orchestrator.errors import ModelError
from orchestrator.store import sha256_file

ORIGIN = Origin("attention", "f" * 64, {}, "base", "b" * 64, "c" * 64, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter folder of two files, and a private file beside it."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (tmp_path / "private").write_text("private")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (adapter / name).write_text(name)
    write_manifest(adapter, ORIGIN, {})
    return adapter


def check(folder: Path) -> None:
    check_files(folder, read_manifest(folder))


def test_what_was_written_is_accepted(folder: Path) -> None:
    check(folder)


@pytest.mark.parametrize(
    "name", ["../private", "{parent}/private", "deep/../../private", "./adapter_config.json", "..", "."]
)
def test_a_path_in_a_manifest_is_refused(folder: Path, name: str) -> None:
    (folder / "deep").mkdir()
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    # With the right hash, so that the path alone is what is wrong.
    manifest["files"][name.format(parent=folder.parent)] = sha256_file(folder.parent / "private")
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=r"is not a plain file name|is missing; the manifest lists it"):
        check(folder)


def test_a_link_to_something_else_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to("../private")
    with pytest.raises(ModelError, match=r"adapter_config\.json is not the file that was written"):
        check(folder)
