"""What a recipe names outside itself is found and hashed before anything starts, and all that is missing is said at once."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RecipeError
from orchestrator.plan.inputs import find_inputs

RANDOM_BASE = {
    "kind": "random",
    "text": ["english.jsonl"],
    "pieces": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "max_positions": 64,
}


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the files that the recipe names."""
    for name in ("text.jsonl", "english.jsonl", "held_out.txt", "instructions.json", "own.txt", "chinese.model"):
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names_by_stage(inputs) -> dict[str, list[str]]:
    return {stage: [file.name for file in files] for stage, files in inputs.data.items()}


def test_every_stage_gets_the_files_it_learns_from(make_recipe, files: Path) -> None:
    changes = {
        "base_model": RANDOM_BASE,
        "stages.attention.data": "own.txt",
        "validation": "held_out.txt",
        "retention": {"text": "english.jsonl", "max_rise": 0.5},
    }
    inputs = find_inputs(make_recipe(changes))
    assert names_by_stage(inputs) == {
        "vocabulary": ["text.jsonl"],
        "embeddings": ["text.jsonl"],
        "attention": ["own.txt"],
        "instruct": ["instructions.json"],
    }
    assert {name: [file.url for file in found] for name, found in inputs.held_out.items()} == {
        "validation": [str(files / "held_out.txt")],
        "retention": [str(files / "english.jsonl")],
    }
    assert [file.name for file in inputs.base_text] == ["english.jsonl"]
    assert inputs.contents.data.keys() == inputs.data.keys()
    assert inputs.contents.data["vocabulary"] == inputs.contents.data["embeddings"] != inputs.contents.data["attention"]


@pytest.mark.parametrize("settings", [{"merge": "none"}, {"sentencepiece_model": "chinese.model"}])
def test_a_vocabulary_stage_that_trains_no_pieces_reads_no_text(make_recipe, settings: dict[str, str]) -> None:
    changes = {f"stages.vocabulary.{name}": value for name, value in settings.items()}
    inputs = find_inputs(make_recipe({"base_model": RANDOM_BASE} | changes))
    assert "vocabulary" not in inputs.data
    assert (inputs.contents.sentencepiece_model is not None) == ("sentencepiece_model" in settings)


def test_a_random_base_counts_by_its_shape_and_its_text(make_recipe, files: Path) -> None:
    def base_of(**changes: int) -> str:
        return find_inputs(make_recipe({"base_model": RANDOM_BASE | changes})).contents.base_model

    before = base_of()
    assert base_of(num_layers=3) != before
    assert base_of() == before
    (files / "english.jsonl").write_text("other")
    assert base_of() != before


def test_everything_that_is_missing_is_said_at_once(make_recipe, files: Path) -> None:
    changes = {
        "base_model": "/models/gone",
        "text": ["gone.jsonl"],
        "instructions": [],
        "validation": ["gone.txt"],
        "stages.vocabulary.sentencepiece_model": "gone.model",
        "stages.attention.data": ["nothing/*.jsonl"],
    }
    with pytest.raises(RecipeError) as caught:
        find_inputs(make_recipe(changes))
    missing = "is no file, folder or pattern that matches"
    assert caught.value.problems == (
        f"base_model: /models/gone is no folder (looked in {files}) and no hub id (owner/name)",
        f"stages.vocabulary.sentencepiece_model: gone.model is no file (looked in {files})",
        f"text: gone.jsonl {missing} (looked in {files})",
        f"stages.attention.data: nothing/*.jsonl {missing} (looked in {files})",
        "instructions: is empty, and stages.instruct learns from it; give files, folders, globs or hub ids",
        f"validation: gone.txt {missing} (looked in {files})",
    )


def test_what_is_missing_twice_is_said_once(make_recipe) -> None:
    with pytest.raises(RecipeError) as caught:
        find_inputs(make_recipe({"base_model": RANDOM_BASE, "text": ["gone.jsonl"]}))
    assert len(caught.value.problems) == 1


def test_every_target_that_is_no_layer_of_the_model_is_named(make_recipe) -> None:
    changes = {
        "base_model": RANDOM_BASE,
        "stages.attention.method.targets": ["q_prog", "v_proj"],
        "stages.instruct.method.targets": ["lm_hat"],
    }
    with pytest.raises(RecipeError) as caught:
        find_inputs(make_recipe(changes))
    layers = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, embed_tokens, lm_head"
    assert str(caught.value).splitlines() == [
        f"stages.attention.method.targets: q_prog names no linear layer of this model; choose from {layers}",
        f"stages.instruct.method.targets: lm_hat names no linear layer of this model; choose from {layers}",
    ]


def test_credentials_in_a_url_are_refused_by_field_and_not_repeated(make_recipe) -> None:
    changes = {
        "base_model": RANDOM_BASE,
        "text": ["https://user:planted@127.0.0.1:1/text.jsonl", "gone.jsonl"],
        "stages.attention.data": ["s3://bucket/text.jsonl?token=planted"],
    }
    with pytest.raises(RecipeError) as caught:
        find_inputs(make_recipe(changes))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["text", "stages.attention.data"]
    assert all("credentials come from the environment" in problem for problem in caught.value.problems)
    assert "planted" not in str(caught.value)


def test_weights_reach_what_is_learned_and_neither_the_tokenizer_nor_what_is_held_out(make_recipe) -> None:
    plain = make_recipe({"base_model": RANDOM_BASE, "text": ["text.jsonl", "own.txt"]})
    sources = [{"path": "text.jsonl", "weight": 0.5}, "own.txt"]
    weighted = make_recipe({"base_model": RANDOM_BASE, "text": sources, "validation": {"share": 0.25}})
    before, after = find_inputs(plain), find_inputs(weighted)
    assert [file.weight for file in after.data["embeddings"]] == [0.5, 1.0]
    assert [file.weight for file in after.data["vocabulary"]] == [1.0, 1.0]
    assert [(file.name, file.weight) for file in after.held_out["validation"]] == [("text.jsonl", 1.0), ("own.txt", 1.0)]
    assert after.contents.data["vocabulary"] == before.contents.data["vocabulary"]
    assert after.contents.data["embeddings"] != before.contents.data["embeddings"]


def test_a_share_of_no_text_is_refused(make_recipe) -> None:
    recipe = make_recipe({"base_model": RANDOM_BASE, "text": None, "validation": {"share": 0.25}})
    with pytest.raises(RecipeError, match=r"validation.share: there is no text to hold out a share of"):
        find_inputs(recipe)


LORA = {"kind": "lora", "targets": ["q_proj"], "rank": 4, "alpha": 8}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"method": "bitfit"},
            "stages.instruct.method: bitfit trains biases, and this model has none; choose another method",
        ),
        (
            {"method": LORA | {"bias": "lora_only"}},
            "stages.instruct.method: bias: lora_only trains biases, and this model has",
        ),
        (
            {"method": LORA | {"dora": True, "targets": ["embed_tokens"]}},
            "stages.instruct.method.dora: is for linear layers",
        ),
        (
            {"method": {"kind": "prefix_tuning", "virtual_tokens": 60}, "packing": False, "block_length": 64},
            "stages.instruct.block_length: 64 + 60 virtual tokens is longer than the base model's 100 positions",
        ),
    ],
)
def test_a_method_that_does_not_fit_the_model_is_refused(make_recipe, changes: dict[str, Any], problem: str) -> None:
    given = {f"stages.instruct.{name}": value for name, value in (changes | {"modules_to_save": []}).items()}
    base = RANDOM_BASE | {"max_positions": 100}
    without = {"stages.embeddings": None, "stages.attention": None, "stages.export.merged": False}
    with pytest.raises(RecipeError) as caught:
        find_inputs(make_recipe({"base_model": base} | without | given))
    assert str(caught.value).startswith(problem)


def test_dora_needs_whole_weights(make_recipe) -> None:
    given = {"base_model": RANDOM_BASE, "stages.attention.method": LORA | {"dora": True}, "stages.instruct.method": None}
    find_inputs(make_recipe(given))
    with pytest.raises(RecipeError, match=r"stages\.attention\.method\.dora: needs whole weights, which zero=3 cuts up"):
        find_inputs(make_recipe(given | {"zero": 3}))


def test_few_bits_and_zero_3_do_not_go_together(make_recipe) -> None:
    given = {"base_model": RANDOM_BASE, "stages.attention.quantization": "nf4"}
    find_inputs(make_recipe(given))
    with pytest.raises(RecipeError, match=r"stages\.attention\.quantization: zero=3 cuts weights up"):
        find_inputs(make_recipe(given | {"zero": 3}))
