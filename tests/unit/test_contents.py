"""The files behind a recipe's names, what is said when there are none, and hashes that do not know where a file lies."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from orchestrator.contents import (
    SAMPLE_FOLDER,
    base_model_folder,
    base_model_hash,
    data_hash,
    find_data,
    linear_layers,
    tokenizer_hash,
    weight_files,
)
from orchestrator.errors import DataError, ModelError

SHARED = Path(os.environ.get("ORCHESTRATOR_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
STORIES = SHARED / "stories260k"
SUFFIXES = ".jsonl, .json, .txt, .parquet"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a corpus."""
    folder = tmp_path.resolve() / "here"
    for name in ("corpus/b.jsonl", "corpus/a.txt", "corpus/deep/c.parquet", "corpus/notes.md", "one[1].txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.chdir(folder)
    return folder


def base_at(folder: Path, *, rows: int = 4, tokens: int = 4) -> Path:
    """A base model as far as planning reads it: configuration, tokenizer, and weights of which only the header counts."""
    shapes = {
        "model.embed_tokens.weight": [rows, 2],
        "model.layers.0.self_attn.q_proj.weight": [2, 2],
        "model.layers.0.mlp.up_proj.weight": [4, 2],
        "model.layers.0.input_layernorm.weight": [2],
        "lm_head.weight": [rows, 2],
    }
    folder.mkdir(parents=True)
    write_header(folder / "model.safetensors", shapes)
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows}))
    vocabulary = {f"piece{id_}": id_ for id_ in range(tokens)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    return folder


def write_header(file: Path, shapes: dict[str, list[int]]) -> None:
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded)


def shard(folder: Path, names: list[str], listed: object) -> None:
    """Puts shards of these names, and an index that lists `listed`, in the place of the one file of weights."""
    (folder / "model.safetensors").unlink()
    for number, name in enumerate(names):
        write_header(folder / name, {f"model.layers.{number}.self_attn.q_proj.weight": [2, 2]})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        (["corpus/b.jsonl"], ["corpus/b.jsonl"]),
        (["corpus"], ["corpus/a.txt", "corpus/b.jsonl", "corpus/deep/c.parquet"]),
        (["corpus/*.txt"], ["corpus/a.txt"]),
        (["corpus/**/*.parquet"], ["corpus/deep/c.parquet"]),
        (["corpus/[ab].*"], ["corpus/a.txt", "corpus/b.jsonl"]),
        (["one[1].txt"], ["one[1].txt"]),
        (["corpus/b.jsonl", "corpus/a.txt"], ["corpus/b.jsonl", "corpus/a.txt"]),
    ],
)
def test_files_folders_patterns_and_lists_are_found_in_order(here: Path, sources: list[str], found: list[str]) -> None:
    assert [file.url for file in find_data("text", sources)] == [str(here / name) for name in found]


def test_absolute_paths_and_the_home_folder_are_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    for source in (f"{here}/corpus/a.txt", "~/corpus/a.txt"):
        assert find_data("text", [source]) == find_data("text", ["corpus/a.txt"])


def test_a_file_is_named_without_its_folder(here: Path) -> None:
    assert [file.name for file in find_data("text", ["corpus"])] == ["a.txt", "b.jsonl", "c.parquet"]


def test_the_samples_ship_with_the_project_and_are_found_from_anywhere() -> None:
    names = sorted(path.name for path in SAMPLE_FOLDER.glob("*.json*"))
    assert len(names) > 3
    assert [file.name for file in find_data("text", [f"sample:{name}" for name in names])] == names


def test_a_url_is_read_and_its_hash_is_of_the_bytes(here: Path) -> None:
    for name in ("a.txt", "b.jsonl", "notes.md"):
        fsspec.filesystem("memory").pipe(f"/test_contents/{name}", f"corpus/{name}".encode())
    local = find_data("text", ["corpus/a.txt", "corpus/b.jsonl"])
    for source in ("memory://test_contents", "memory://test_contents/*"):
        remote = find_data("text", [source])
        assert [file.url for file in remote] == ["memory:///test_contents/a.txt", "memory:///test_contents/b.jsonl"]
        assert data_hash(remote) == data_hash(local)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone.jsonl", "text: gone.jsonl is no file, folder or pattern that matches (looked in {here})"),
        ("corpus/gone.txt", "text: corpus/gone.txt is no file, folder or pattern that matches (looked in {here})"),
        ("./gone", "text: ./gone is no file, folder or pattern that matches (looked in {here})"),
        ("/data/gone", "text: /data/gone is no file, folder or pattern that matches (looked in {here})"),
        ("corpus/*.json", "text: corpus/*.json is no file, folder or pattern that matches (looked in {here})"),
        ("sample:gone.txt", "text: sample:gone.txt is no file, folder or pattern that matches (looked in {samples})"),
        ("nothing", f"text: nothing holds no {SUFFIXES} file (looked in {{here}})"),
        ("corpus/notes.md", f"text: corpus/notes.md is none of {SUFFIXES}"),
        ("corpus/*", f"text: corpus/notes.md is none of {SUFFIXES}"),
        ("empty.txt", "text: empty.txt is empty"),
        ("memory://gone", f"text: memory://gone holds no {SUFFIXES} file"),
        ("nosuch://gone", "text: nosuch://gone is no local file, and could not be read as a URL or hub id: Protocol"),
    ],
)
def test_a_source_that_yields_nothing_is_named_with_the_reason(here: Path, source: str, message: str) -> None:
    (here / "nothing").mkdir()
    (here / "empty.txt").touch()
    with pytest.raises(DataError) as caught:
        find_data("text", ["corpus/a.txt", source])
    assert str(caught.value).startswith(message.format(here=here, samples=SAMPLE_FOLDER))


def test_the_hash_of_data_knows_bytes_and_order_and_no_place(here: Path) -> None:
    before = data_hash(find_data("text", ["corpus"]))
    shutil.copytree("corpus", "elsewhere")
    assert data_hash(find_data("text", ["elsewhere"])) == before
    assert data_hash(find_data("text", ["corpus/b.jsonl", "corpus/a.txt", "corpus/deep"])) != before
    (here / "corpus/deep/c.parquet").write_text("other")
    assert data_hash(find_data("text", ["corpus"])) != before


def test_a_base_model_is_found_by_an_absolute_and_by_a_relative_path(here: Path) -> None:
    folder = base_at(here / "models/base")
    assert base_model_folder(str(folder)) == base_model_folder("models/base") == folder


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "has no config.json; give a folder in Hugging Face format"),
        (
            "model.safetensors",
            "has no model.safetensors and no model.safetensors.index.json; give a model whose weights are safetensors, "
            "as transformers saves them",
        ),
        ("tokenizer.json", "has no tokenizer; put its tokenizer.json or tokenizer.model beside the weights"),
    ],
)
def test_a_base_model_that_lacks_a_part_is_refused(here: Path, missing: str, message: str) -> None:
    folder = base_at(here / "models/base")
    (folder / missing).unlink()
    with pytest.raises(ModelError) as caught:
        base_model_folder("models/base")
    assert str(caught.value) == f"base_model: {folder} {message}"


def test_a_base_model_with_fewer_rows_than_tokens_is_refused(here: Path) -> None:
    folder = base_at(here / "models/base", rows=4, tokens=5)
    with pytest.raises(ModelError) as caught:
        base_model_folder("models/base")
    assert "has 4 rows in its embedding (vocab_size in config.json), but its tokenizer has 5 tokens" in str(caught.value)
    assert str(caught.value).startswith(f"base_model: {folder} ")


@pytest.mark.parametrize("base_model", ["gone", "/models/gone", "./gone", "../models/gone"])
def test_a_path_without_a_base_model_is_not_asked_for_at_the_hub(here: Path, base_model: str) -> None:
    with pytest.raises(ModelError) as caught:
        base_model_folder(base_model)
    assert str(caught.value) == f"base_model: {base_model} is no folder (looked in {here}) and no hub id (owner/name)"


def test_a_hub_id_without_a_network_is_a_clear_error_at_once(tmp_path: Path) -> None:
    code = """
from orchestrator.contents import base_model_folder, find_data
from orchestrator.errors import OrchestratorError
for find in (lambda: base_model_folder("owner/model"), lambda: find_data("text", ["owner/data"])):
    try:
        find()
    except OrchestratorError as error:
        print(str(error).replace(chr(10), " "))
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert result.stderr == ""
    model, data = result.stdout.splitlines()
    assert model.startswith("base_model: owner/model is no local folder, and the hub did not give it: ")
    assert data.startswith("text: hf://datasets/owner/data is no local file, and could not be read as a URL or hub id: ")
    assert "HF_HUB_OFFLINE" in model
    assert "HF_HUB_OFFLINE" in data


def test_base_model_and_tokenizer_have_hashes_of_their_own_that_know_no_place(here: Path) -> None:
    def hashes(folder: Path) -> tuple[str, str]:
        return base_model_hash(folder), tokenizer_hash(folder)

    before = hashes(base_at(here / "base"))
    folder = Path(shutil.copytree("base", "copy"))
    (folder / "README.md").write_text("not what a model computes")
    assert hashes(folder) == before
    (folder / "tokenizer_config.json").write_text("{}")
    with_tokenizer = hashes(folder)
    assert [new == old for new, old in zip(with_tokenizer, before, strict=True)] == [True, False]
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        after = hashes(folder)
        assert [new == old for new, old in zip(after, with_tokenizer, strict=True)] == [False, True]


def test_a_folder_without_a_tokenizer_has_no_hash(here: Path) -> None:
    with pytest.raises(ModelError, match=r"corpus has no tokenizer files; expected one of tokenizer\.json, "):
        tokenizer_hash(here / "corpus")


def test_linear_layers_are_the_matrices_inside_the_blocks(here: Path) -> None:
    assert linear_layers(base_at(here / "base")) == (
        "model.layers.0.mlp.up_proj",
        "model.layers.0.self_attn.q_proj",
    )


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not there; set ORCHESTRATOR_SHARED_DATA")
def test_a_published_base_model_is_accepted() -> None:
    folder = base_model_folder(str(STORIES))
    names = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    layers = linear_layers(folder)
    assert {layer.rsplit(".", 1)[-1] for layer in layers} == set(names)
    assert layers[7] == "model.layers.1.mlp.down_proj"
    assert len(layers) == 5 * len(names)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_base_model_with_a_broken_file_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_text('{"vocab_size": 8, "model": {"vocab": {"a": 0}}}', encoding="utf-8")
    write_header(tmp_path / "model.safetensors", {})
    base_model_folder(str(tmp_path))
    (tmp_path / name).write_text('{"vocab_size": ', encoding="utf-8")
    with pytest.raises(ModelError, match=rf"{name} is not JSON"):
        base_model_folder(str(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_base_model_with_pickled_weights_alone_is_refused_with_the_way_out(here: Path, name: str) -> None:
    folder = base_at(here / "base")
    (folder / name).touch()
    assert base_model_folder("base") == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        base_model_folder("base")
    assert f"its weights are pickled ({name}), and loading a pickle can run any code" in str(caught.value)
    assert "take the model in safetensors, or convert it" in str(caught.value)


def test_the_weights_are_what_transformers_loads_and_no_other_file(here: Path) -> None:
    folder = base_at(here / "base")
    before = base_model_hash(folder)
    write_header(folder / "consolidated.safetensors", {"layers.0.attention.wq.weight": [2, 2]})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "consolidated.safetensors"}}))
    assert weight_files(folder) == ("model.safetensors",)
    assert base_model_hash(folder) == before
    assert not any("wq" in layer for layer in linear_layers(folder))
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shard(folder, names, {"b": names[1], "a": names[0], "c": names[1]})
    assert weight_files(base_model_folder("base")) == tuple(names)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/outside.safetensors",
        "deep/../../outside.safetensors",
        "deep/a.safetensors",
        "a.bin",
        "a.safetensors/../a.bin",
        "a.safetensors\n",
        ".safetensors",
        "..",
        "",
        7,
        None,
        ["a.safetensors"],
    ],
)
def test_an_index_that_names_anything_but_safetensors_of_its_folder_is_refused(here: Path, name: object) -> None:
    folder = base_at(here / "base")
    write_header(here / "outside.safetensors", {})
    shard(folder, ["a.safetensors"], {"a": "a.safetensors", "b": name})
    expected = f"names {name!r}, which is no safetensors file of its own folder"
    with pytest.raises(ModelError) as caught:
        base_model_folder("base")
    assert str(caught.value).startswith(f"base_model: {folder / 'model.safetensors.index.json'} {expected}")
    with pytest.raises(ModelError, match="which is no safetensors file of its own folder"):
        base_model_hash(folder)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"a": "a.safetensors", "b": "gone.safetensors"}, "has no gone.safetensors, which its model.safetensors.index.json"),
        ({}, "has no weight_map"),
        (["a.safetensors"], "has no weight_map"),
    ],
)
def test_an_index_that_is_not_met_is_refused(here: Path, listed: object, message: str) -> None:
    shard(base_at(here / "base"), ["a.safetensors"], listed)
    with pytest.raises(ModelError, match=message):
        base_model_folder("base")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + b"\0" * 100, b"\x80\x02}q\x00.", struct.pack("<Q", 2) + b"[]"])
def test_a_file_that_is_called_safetensors_and_is_none_is_refused(here: Path, content: bytes) -> None:
    folder = base_at(here / "base")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"base_model: .*model\.safetensors is no safetensors file"):
        base_model_folder("base")
