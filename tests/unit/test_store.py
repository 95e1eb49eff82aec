"""Files appear whole or not at all, and a hash is of the bytes that are there now."""

import hashlib
import os
import threading
from pathlib import Path

import pytest

from orchestrator import store

LARGE = 3 << 20
"""Bytes; above what the memory of hashes leaves out."""


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The memory of hashes, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "orchestrator" / "sha256"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("size", [0, 10, LARGE])
def test_the_hash_of_a_file_is_the_sha256_of_its_bytes(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert store.sha256_file(tmp_path / "file") == sha256(content)
    assert store.sha256_file(tmp_path / "file") == sha256(content)


def test_a_large_file_is_hashed_once(tmp_path: Path, memory: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(LARGE))
    store.sha256_file(tmp_path / "file")
    (entry,) = memory.iterdir()
    entry.write_text("remembered")
    assert store.sha256_file(tmp_path / "file") == "remembered"


def test_a_changed_file_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (bytes(LARGE), b"1" * LARGE, b"1" * (LARGE + 1)):
        path.write_bytes(content)
        assert store.sha256_file(path) == sha256(content)


def test_a_hash_of_now_knows_nothing_of_before(tmp_path: Path, memory: Path) -> None:
    path = tmp_path / "file"
    for content in (bytes(LARGE), b"1" * LARGE):
        path.write_bytes(content)
        os.utime(path, ns=(0, 0))
        assert store.sha256_now(path) == sha256(content)
        store.sha256_file(path)
    # The two look alike, so what is remembered is the hash of the first.
    assert store.sha256_file(path) == sha256(bytes(LARGE))


def test_a_file_put_in_the_place_of_another_is_hashed_again(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(bytes(LARGE))
    other.write_bytes(b"1" * LARGE)
    for file in (path, other):
        os.utime(file, ns=(0, 0))
    store.sha256_file(path)
    other.rename(path)
    assert store.sha256_file(path) == sha256(b"1" * LARGE)


def test_a_memory_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    (tmp_path / "file").write_bytes(bytes(LARGE))
    assert store.sha256_file(tmp_path / "file") == sha256(bytes(LARGE))


def test_the_hash_of_a_folder_names_its_files(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / name).write_text(name)
    assert list(store.sha256_folder(tmp_path, ["b", "a"]).items()) == [("a", sha256(b"a")), ("b", sha256(b"b"))]


def test_a_value_hashes_by_what_it_says_and_not_by_the_order_of_its_keys() -> None:
    assert store.sha256_value({"b": [1, "文"], "a": None}) == store.sha256_value({"a": None, "b": [1, "文"]})
    assert store.sha256_value({"a": 1}) != store.sha256_value({"a": 2})
    assert store.canonical_json({"b": [1, "文"], "a": None}) == '{"a":null,"b":[1,"文"]}'
    with pytest.raises(ValueError, match="JSON"):
        store.sha256_value(float("nan"))


def test_json_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    value = {"名": [1, 2.5, None, True], "nested": {"a": "b"}}
    store.write_json(tmp_path / "new" / "folder" / "value.json", value)
    assert store.read_json(tmp_path / "new" / "folder" / "value.json") == value


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    store.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        store.write_json(path, {"a": float("inf")})
    with pytest.raises(TypeError):
        store.write_bytes(path, "not bytes")  # pyrefly: ignore[bad-argument-type]
    assert store.read_json(path) == {"a": 1}
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        store.write_bytes(tmp_path / "folder", b"a")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["folder", "value.json"]


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    path, written = tmp_path / "file", threading.Event()
    versions = {bytes([letter]) * 100_000 for letter in b"ab"}
    store.write_bytes(path, min(versions))

    def write() -> None:
        for version in [*versions] * 10:
            store.write_bytes(path, version)
        written.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not written.is_set():
        seen.add(path.read_bytes())
    writer.join()
    assert seen <= versions


def test_a_written_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    store.write_bytes(tmp_path / "ours", b"a")
    (tmp_path / "any").write_bytes(b"a")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any").stat().st_mode
