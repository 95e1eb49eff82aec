"""Fingerprints hold content and never location, and only what is needed runs."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RecipeError
from orchestrator.plan.inputs import find_inputs
from orchestrator.plan.plan import Contents, Plan, State, make_plan
from orchestrator.plan.record import read_record
from orchestrator.schema import ExportStage, Recipe, TrainStage, VocabularyStage
from orchestrator.store import sha256_value

NAMES = ["vocabulary", "embeddings", "attention", "instruct", "export"]
LORA = {"kind": "lora", "targets": ["k_proj"], "rank": 8, "alpha": 32}
OTHER_TRAINING = {
    "objective": "answers",
    "template": "chat",
    "packing": False,
    "block_length": 32,
    "method": LORA,
    "modules_to_save": ["lm_head"],
    "new_rows": ["embed_tokens"],
    "quantization": "nf4",
    "keep_best": {"every_steps": 5},
    "optimizer": "adamw_8bit",
    "global_batch_size": 8,
    "steps": 11,
    "epochs": 2.0,
    "learning_rate": 1e-3,
    "schedule": "constant",
    "warmup_fraction": 0.1,
    "weight_decay": 0.1,
    "max_gradient_norm": 0.5,
}
OTHER_VOCABULARY = {
    "merge": "published",
    "pieces": 101,
    "character_coverage": 1.0,
    "pad_token": "[PAD]",
    "pad_to_multiple": 1,
    "new_rows": "mean",
}
OTHER_EXPORT = {"merged": False, "max_shard_bytes": 10, "verify_tokens": 0}


def fingerprints(recipe: Recipe, contents: Contents) -> list[str]:
    return [planned.fingerprint for planned in make_plan(recipe, contents, Path("/nowhere")).stages]


def changed(before: list[str], after: list[str]) -> list[str]:
    assert len(before) == len(after) == len(NAMES)
    return [name for name, old, new in zip(NAMES, before, after, strict=True) if old != new]


def states(plan: Plan) -> dict[str, str]:
    return {planned.name: planned.state.value for planned in plan.stages}


def reasons(plan: Plan) -> dict[str, str]:
    return {planned.name: planned.reason for planned in plan.stages}


def test_stages_are_numbered_and_their_folders_named_by_their_fingerprints(recipe, contents) -> None:
    plan = make_plan(recipe, contents, Path("/runs"))
    assert [(planned.number, planned.name) for planned in plan.stages] == list(enumerate(NAMES))
    assert all(len(planned.fingerprint) == 64 for planned in plan.stages)
    assert [planned.folder for planned in plan.stages] == [
        Path(f"/runs/{planned.name}-{planned.fingerprint[:12]}") for planned in plan.stages
    ]


def test_the_payload_that_a_record_keeps_hashes_to_the_fingerprint(recipe, contents, finish, tmp_path: Path) -> None:
    for planned in make_plan(recipe, contents, tmp_path).stages:
        finish(planned)
        record = read_record(planned.folder)
        assert record is not None
        assert sha256_value(record.identity) == record.fingerprint == planned.fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"workers": 4},
        {"zero": 3},
        {"run_root": "/elsewhere"},
        {"name": "other"},
        {"stage": "instruct"},
        {"base_model": "/moved/base"},
        {"text": ["moved.jsonl"]},
        {"stages.attention.data": ["moved.jsonl"]},
        {"validation": ["held_out.jsonl"]},
        {"retention": {"text": "old.jsonl", "max_rise": 0.5}},
        {"cluster": {"kind": "address", "address": "auto"}},
        {"tracking": {"kind": "wandb"}},
        {"stages.attention.log_every_steps": 10},
        {"stages.attention.resources.micro_batch_size": 1},
        {"stages.attention.resources.gradient_checkpointing": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_where_and_how_it_is_computed_changes_no_fingerprint(make_recipe, recipe, contents, changes: dict[str, Any]) -> None:
    assert make_recipe(changes) != recipe
    assert fingerprints(make_recipe(changes), contents) == fingerprints(recipe, contents)


def test_the_run_root_changes_no_fingerprint(recipe, contents, tmp_path: Path) -> None:
    plan = make_plan(recipe, contents, tmp_path)
    assert [planned.fingerprint for planned in plan.stages] == fingerprints(recipe, contents)


def test_another_learning_rate_changes_its_stage_and_all_that_follow(make_recipe, recipe, contents) -> None:
    after = fingerprints(make_recipe({"stages.attention.learning_rate": 2e-4}), contents)
    assert changed(fingerprints(recipe, contents), after) == ["attention", "instruct", "export"]


@pytest.mark.parametrize(
    ("name", "kind", "others", "computed"),
    [
        ("vocabulary", VocabularyStage, OTHER_VOCABULARY, {"sentencepiece_model", "data"}),
        ("attention", TrainStage, OTHER_TRAINING, {"resources", "log_every_steps", "data"}),
        ("export", ExportStage, OTHER_EXPORT, set()),
    ],
)
def test_every_other_field_of_a_stage_is_its_identity(
    make_recipe, recipe, contents, name: str, kind: type, others: dict[str, Any], computed: set[str]
) -> None:
    assert others.keys() == kind.model_fields.keys() - computed - {"kind"}
    for field, value in others.items():
        # No module is trained both ways.
        given = {f"stages.{name}.modules_to_save": ["lm_head"]} if (kind, field) == (TrainStage, "new_rows") else {}
        before = fingerprints(make_recipe(given), contents)
        changes = given | {f"stages.{name}.{field}": value} | ({f"stages.{name}.steps": None} if field == "epochs" else {})
        after = fingerprints(make_recipe(changes), contents)
        assert changed(before, after) == NAMES[NAMES.index(name) :], field


def test_the_seed_changes_every_stage_and_precision_only_what_is_trained(make_recipe, recipe, contents) -> None:
    before = fingerprints(recipe, contents)
    assert changed(before, fingerprints(make_recipe({"seed": 2}), contents)) == NAMES
    assert changed(before, fingerprints(make_recipe({"precision": "fp32"}), contents)) == NAMES[1:]


@pytest.mark.parametrize(
    ("changes", "learned_otherwise"),
    [
        ({"reading.deduplicate": True}, ("embeddings", "attention", "instruct")),
        ({"reading.bad_records": "skip"}, ("embeddings", "attention", "instruct")),
        ({"validation": {"share": 0.1}}, ("embeddings", "attention")),
        ({"validation": "other.txt"}, ()),
    ],
)
def test_what_is_left_out_of_the_data_is_identity(make_recipe, recipe, contents, changes, learned_otherwise) -> None:
    before, after = (make_plan(each, contents, Path("runs")) for each in (recipe, make_recipe(changes)))
    changed = {stage.name for stage in after.stages if stage.identity != before.named(stage.name).identity}
    first = list(recipe.stages).index(learned_otherwise[0]) if learned_otherwise else len(recipe.stages)
    # What learns otherwise, and what is made from it.
    assert changed == set(list(recipe.stages)[first:])
    own = {stage.name for stage in after.stages if {"reading", "held_out_share"} & stage.identity.keys()}
    assert own == set(learned_otherwise)


def test_other_content_changes_what_is_made_from_it(recipe, contents) -> None:
    before = fingerprints(recipe, contents)
    for other in (replace(contents, base_model="0" * 64), replace(contents, base_tokenizer="0" * 64)):
        assert changed(before, fingerprints(recipe, other)) == NAMES
    other = replace(contents, data={**contents.data, "attention": "0" * 64})
    assert changed(before, fingerprints(recipe, other)) == ["attention", "instruct", "export"]


def test_without_a_vocabulary_stage_the_first_training_stage_holds_the_base(make_recipe, contents) -> None:
    recipe = make_recipe({"stages.vocabulary": None})
    plan = make_plan(recipe, contents, Path("/runs"))
    assert plan.named("embeddings").identity["base_model"] == contents.base_model
    assert plan.named("embeddings").identity["base_tokenizer"] == contents.base_tokenizer
    assert list(plan.named("attention").parents) == ["embeddings"]


def test_a_given_sentencepiece_model_counts_by_content_in_place_of_the_text(make_recipe, contents) -> None:
    def vocabulary_of(path: str, digest: str, text: str = "1") -> str:
        given = replace(contents, sentencepiece_model=digest * 64, data={**contents.data, "vocabulary": text * 64})
        return fingerprints(make_recipe({"stages.vocabulary.sentencepiece_model": path}), given)[0]

    assert vocabulary_of("a.model", "a") == vocabulary_of("moved/a.model", "a") == vocabulary_of("a.model", "a", text="2")
    assert vocabulary_of("a.model", "a") != vocabulary_of("a.model", "b")


def test_data_counts_by_content_and_not_by_place(make_recipe, tmp_path: Path) -> None:
    def plan_of(folder: Path) -> list[str]:
        sources = {"text": [str(folder / "text.jsonl")], "instructions": [str(folder / "instructions.json")]}
        base = {"kind": "random", "text": [str(folder / "text.jsonl")], "pieces": 300, "max_positions": 64}
        sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_key_value_heads"), 1)
        recipe = make_recipe({**sources, "base_model": base | sizes})
        return fingerprints(recipe, find_inputs(recipe).contents)

    first = tmp_path / "first"
    first.mkdir()
    (first / "text.jsonl").write_text('{"text": "one"}\n')
    (first / "instructions.json").write_text('[{"instruction": "a", "output": "b"}]')
    before = plan_of(first)
    moved = Path(shutil.move(first, tmp_path / "moved"))
    assert plan_of(moved) == before
    (moved / "instructions.json").write_text('[{"instruction": "a", "output": "c"}]')
    assert changed(before, plan_of(moved)) == ["instruct", "export"]


def test_a_plan_runs_what_is_asked_for_and_what_that_needs(make_recipe, contents, tmp_path: Path) -> None:
    plan = make_plan(make_recipe({"stage": 2}), contents, tmp_path / "runs")
    assert [planned.name for planned in plan.to_run] == ["vocabulary", "embeddings", "attention"]
    assert reasons(plan) == {
        "vocabulary": "needed by a later stage; new",
        "embeddings": "needed by a later stage; new",
        "attention": "new",
        "instruct": "not asked for",
        "export": "not asked for",
    }


def test_planning_writes_nothing(recipe, contents, tmp_path: Path) -> None:
    make_plan(recipe, contents, tmp_path / "runs")
    assert list(tmp_path.iterdir()) == []


def test_what_is_done_is_not_run_again(recipe, make_recipe, contents, finish, tmp_path: Path) -> None:
    for planned in make_plan(recipe, contents, tmp_path).stages:
        finish(planned)
    plan = make_plan(recipe, contents, tmp_path)
    assert set(states(plan).values()) == {"DONE"}
    assert plan.to_run == ()
    assert [planned.record.stage for planned in plan.stages if planned.record] == NAMES
    other = make_plan(make_recipe({"stage": "instruct"}), contents, tmp_path)
    assert states(other) == dict.fromkeys(NAMES, "DONE")
    assert other.to_run == ()


def test_a_finished_stage_prunes_its_ancestors(make_recipe, contents, finish, tmp_path: Path) -> None:
    recipe = make_recipe({"stage": 3})
    finish(make_plan(recipe, contents, tmp_path).named("instruct"))
    plan = make_plan(recipe, contents, tmp_path)
    assert states(plan) == dict.fromkeys(NAMES, "SKIP") | {"instruct": "DONE"}
    assert plan.to_run == ()


def test_a_later_stage_brings_back_the_base_of_a_deleted_vocabulary_and_no_more(
    make_recipe, contents, finish, tmp_path: Path
) -> None:
    recipe = make_recipe({"stage": "export"})
    finish(make_plan(recipe, contents, tmp_path).named("instruct"))
    plan = make_plan(recipe, contents, tmp_path)
    assert states(plan) == {
        "vocabulary": "RUN",
        "embeddings": "SKIP",
        "attention": "SKIP",
        "instruct": "DONE",
        "export": "RUN",
    }


def test_a_changed_stage_goes_on_from_the_finished_ones(recipe, make_recipe, contents, finish, tmp_path: Path) -> None:
    for planned in make_plan(recipe, contents, tmp_path).stages:
        finish(planned)
    plan = make_plan(make_recipe({"stages.instruct.steps": 20}), contents, tmp_path)
    assert [planned.name for planned in plan.to_run] == ["instruct", "export"]
    assert reasons(plan)["instruct"].startswith("steps 10 → 20 (against instruct-")


def test_a_folder_without_a_record_is_run(recipe, contents, tmp_path: Path) -> None:
    vocabulary = make_plan(recipe, contents, tmp_path).named("vocabulary")
    vocabulary.folder.mkdir()
    (vocabulary.folder / "tokenizer.json").write_text("{")
    plan = make_plan(recipe, contents, tmp_path)
    assert plan.named("vocabulary").state is State.RUN
    assert plan.named("vocabulary").reason == "not finished yet"


def leave_checkpoint(stage_folder: Path, name: str) -> None:
    """As rank 0 leaves one, under this name; the plan looks at names alone."""
    folder = stage_folder / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def test_a_stage_goes_on_from_its_newest_checkpoint(make_recipe, contents, tmp_path: Path) -> None:
    recipe = make_recipe({"stage": ["embeddings"]})
    folder = make_plan(recipe, contents, tmp_path).named("embeddings").folder
    leave_checkpoint(folder, "step-00000020")
    leave_checkpoint(folder, "step-00000040")
    plan = make_plan(recipe, contents, tmp_path)
    assert plan.named("embeddings").state is State.RESUME
    assert plan.named("embeddings").reason == "goes on from step 40"
    assert [planned.name for planned in plan.to_run] == ["vocabulary", "embeddings"]
    later = make_plan(make_recipe({"stage": "attention"}), contents, tmp_path)
    assert reasons(later)["embeddings"] == "needed by a later stage; goes on from step 40"
    unwanted = make_plan(make_recipe({"stage": "vocabulary"}), contents, tmp_path)
    assert (states(unwanted)["embeddings"], reasons(unwanted)["embeddings"]) == ("SKIP", "not asked for")


def test_a_checkpoint_that_is_half_written_is_none(recipe, contents, tmp_path: Path) -> None:
    folder = make_plan(recipe, contents, tmp_path).named("embeddings").folder
    (folder / "checkpoints" / "step-00000040").mkdir(parents=True)
    for name in (".step-00000050.partial", ".step-00000030.removed", "step-60"):
        leave_checkpoint(folder, name)
    plan = make_plan(recipe, contents, tmp_path)
    assert plan.named("embeddings").state is State.RUN
    assert plan.named("embeddings").reason == "not finished yet"
    leave_checkpoint(folder, "step-00000020")
    assert reasons(make_plan(recipe, contents, tmp_path))["embeddings"] == "goes on from step 20"


def test_a_checkpoint_whose_successor_never_came_still_counts(recipe, contents, tmp_path: Path) -> None:
    leave_checkpoint(make_plan(recipe, contents, tmp_path).named("embeddings").folder, ".step-00001040.replaced")
    assert reasons(make_plan(recipe, contents, tmp_path))["embeddings"] == "goes on from step 1,040"


def test_a_finished_stage_is_done_whatever_checkpoints_it_left(recipe, contents, finish, tmp_path: Path) -> None:
    embeddings = make_plan(recipe, contents, tmp_path).named("embeddings")
    finish(embeddings)
    leave_checkpoint(embeddings.folder, "step-00000040")
    plan = make_plan(recipe, contents, tmp_path)
    assert plan.named("embeddings").state is State.DONE
    assert "embeddings" not in [planned.name for planned in plan.to_run]


def test_a_plan_takes_up_a_new_record(recipe, contents, finish, tmp_path: Path) -> None:
    plan = make_plan(recipe, contents, tmp_path)
    record = finish(plan.named("vocabulary"))
    after = plan.with_record("vocabulary", record)
    assert [planned.name for planned in after.to_run] == NAMES[1:]
    assert after.named("vocabulary").record == record
    assert plan.named("vocabulary").record is None


def test_a_stage_is_made_from_the_last_vocabulary_and_the_last_training(recipe, contents, tmp_path: Path) -> None:
    plan = make_plan(recipe, contents, tmp_path)
    export = plan.named("export")
    assert plan.base_of(export) == plan.named("vocabulary")
    assert plan.learned_before(export) == plan.named("instruct")
    assert plan.learned_before(plan.named("embeddings")) is None
    assert export.parents == {name: plan.named(name).fingerprint for name in ("vocabulary", "instruct")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stages.words": {"kind": "vocabulary"}},
            "stages.words: there is one vocabulary stage already, stages.vocabulary; extend it in one",
        ),
        (
            {"stages.words": {"kind": "vocabulary"}, "stages.vocabulary": None},
            "stages.words: a vocabulary stage must come before every training stage",
        ),
        (
            {f"stages.{name}": None for name in ("embeddings", "attention", "instruct")},
            "stages.export: there is no training stage before it whose result could be exported",
        ),
        ({"stage": "instrct"}, "stage: there is no stage 'instrct'; did you mean instruct?"),
        (
            {"stages.instruct.method": {"kind": "lora", "targets": ["q_proj"], "rank": 4, "alpha": 8}},
            "stages.instruct.method: q_proj was given rank 8 and alpha 32 by stages.attention",
        ),
    ],
)
def test_what_cannot_be_carried_out_is_refused(make_recipe, contents, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_plan(make_recipe(changes), contents, Path("/runs"))
    assert str(caught.value).startswith(message)
