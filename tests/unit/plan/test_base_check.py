"""A base model may come from anywhere: what in its folder would do more than be read is refused before anything starts."""

import json
from pathlib import Path

import pytest

from orchestrator.errors import RecipeError
from orchestrator.plan.base_check import unsafe_files
from orchestrator.plan.inputs import find_inputs

HEADER = b'{"model.layers.0.self_attn.q_proj.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 0]}}'
CODE = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model as far as planning reads it."""
    folder = tmp_path.resolve() / "base"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(len(HEADER).to_bytes(8, "little") + HEADER)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({"model": {"vocab": {}}}))
    (folder / "tokenizer.model").touch()
    return folder


def say(file: Path, **entries: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_safetensors_and_json_are_safe(base: Path) -> None:
    say(base / "config.json", auto_map=None)
    assert unsafe_files(base) == []


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_with_code_of_its_own_is_refused(base: Path, name: str) -> None:
    say(base / name, auto_map=CODE)
    (problem,) = unsafe_files(base)
    assert problem.startswith(f"{base / name} asks for Python code of the model's own (auto_map), which is never run here; ")
    assert problem.endswith("take auto_map out of that file")


def test_weights_under_another_name_are_refused(base: Path) -> None:
    say(base / "config.json", transformers_weights="adapter_model.bin")
    (problem,) = unsafe_files(base)
    assert problem.startswith(f"{base}/config.json has its weights loaded from adapter_model.bin (transformers_weights)")


def test_an_adapter_in_the_folder_is_refused(base: Path) -> None:
    (base / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    (problem,) = unsafe_files(base)
    assert problem.startswith(f"{base} holds an adapter (adapter_config.json)")


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "generation_config.json", "model.safetensors"])
@pytest.mark.parametrize("target", ["../private", "{absolute}/private", "inside/../../private", "../dangling"])
def test_a_link_out_of_the_folder_is_refused(base: Path, name: str, target: str) -> None:
    (base.parent / "private").write_text("{}")
    (base / "inside").mkdir()
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(target.format(absolute=base.parent))
    assert unsafe_files(base) == [f"{base / name} is a link that leads out of the model's folder; put the file itself there"]


def test_links_within_the_folder_and_to_the_folder_are_followed(base: Path) -> None:
    (base / "model.safetensors").rename(base / "weights")
    (base / "model.safetensors").symlink_to("weights")
    (base.parent / "link").symlink_to(base)
    assert unsafe_files(base.parent / "link") == []


def test_the_links_of_the_hubs_cache_are_followed_to_its_blobs_alone(base: Path) -> None:
    cache = base.parent / "models--owner--name"
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    base.rename(snapshot)
    (cache / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).rename(cache / "blobs" / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert unsafe_files(snapshot) == []
    (cache / "private").touch()
    (snapshot / "merges.txt").symlink_to("../../private")
    assert len(unsafe_files(snapshot)) == 1
    elsewhere = cache.rename(cache.with_name("models"))
    assert len(unsafe_files(elsewhere / "snapshots" / "0123abc")) == 3


def test_planning_refuses_what_is_unsafe_by_every_file_and_asks_no_more(make_recipe, base: Path, tmp_path: Path) -> None:
    for name in ("text.jsonl", "instructions.json"):
        (tmp_path / name).write_text("{}")
    sources = {"text": [str(tmp_path / "text.jsonl")], "instructions": [str(tmp_path / "instructions.json")]}
    targets = {"stages.attention.method.targets": ["q_prog"], "stages.instruct.method.targets": ["q_proj"]}
    recipe = make_recipe({"base_model": str(base)} | sources | targets)
    with pytest.raises(RecipeError, match="q_prog names no linear layer") as caught:
        find_inputs(recipe)
    assert len(caught.value.problems) == 1
    for name in ("config.json", "tokenizer_config.json"):
        say(base / name, auto_map=CODE)
    with pytest.raises(RecipeError) as caught:
        find_inputs(recipe)
    assert [problem.partition(" asks")[0] for problem in caught.value.problems] == [
        f"base_model: {base / name}" for name in ("config.json", "tokenizer_config.json")
    ]


def test_a_base_that_is_stored_in_few_bits_is_refused(make_recipe, base: Path, tmp_path: Path) -> None:
    for name in ("text.jsonl", "instructions.json"):
        (tmp_path / name).write_text("{}")
    say(base / "config.json", quantization_config={"load_in_4bit": True})
    sources = {"text": [str(tmp_path / "text.jsonl")], "instructions": [str(tmp_path / "instructions.json")]}
    with pytest.raises(RecipeError, match="base_model: its weights are stored in a few bits"):
        find_inputs(make_recipe({"base_model": str(base)} | sources))
