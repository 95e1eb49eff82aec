"""From words to a recipe: what is accepted, and what is said of every kind of mistake."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, ListConfig
from pydantic import BaseModel

from orchestrator.compose import RECIPES_FOLDER, compose, sweep
from orchestrator.errors import RecipeError
from orchestrator.schema import LocalCluster, RandomBase, Range, Recipe, TrainStage, WandbTracking


def problems(*words: str, folder: Path = RECIPES_FOLDER) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        compose(words, folder)
    return caught.value.problems


def train_stage(recipe: Recipe, name: str) -> TrainStage:
    stage = recipe.stages[name]
    assert isinstance(stage, TrainStage)
    return stage


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """A copy of the recipes to put mistakes into."""
    return Path(shutil.copytree(RECIPES_FOLDER, tmp_path / "recipes", ignore=shutil.ignore_patterns("sample")))


def replace_once(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}"
    file.write_text(text.replace(old, new), encoding="utf-8")


UNKNOWN_KEYS = {
    "sead=2": "sead: no such key; did you mean seed?",
    "trackin=none": "trackin: no such key; did you mean tracking?",
    "stages.attention.method.rnk=4": "stages.attention.method.rnk: no such key; did you mean rank?",
    "stages.attention.resources.micro_batch=4": (
        "stages.attention.resources.micro_batch: no such key; did you mean micro_batch_size?"
    ),
    "base_model.hiden_size=64": "base_model.hiden_size: no such key; did you mean hidden_size?",
    "tracking.projct=x": "tracking.projct: no such key; did you mean project?",
    "retention.max_ris=1": "retention.max_ris: no such key; did you mean max_rise?",
    "stages.atention.steps=4": (
        "stages.atention: there is no such stage, and a new one needs its `kind`; did you mean attention?"
    ),
}
BAD_VALUES = {
    "seed=-1": "seed: input should be greater than or equal to 0, not -1",
    "zero=4": "zero: input should be 0, 1, 2 or 3, not 4",
    "precision=fp64": "precision: input should be 'bf16', 'fp16' or 'fp32', not 'fp64'",
    "workers=0": "workers: input should be a number above 0, or a range of two such as 2-8, not 0",
    "run_root=null": "run_root: input should be a valid string, not None",
    "text=5": "text: input should be a list, not 5",
    "validation=[a.txt,5]": "validation.1: input should be a valid string, not 5",
    "stage=null": "stage: input should be a valid integer or a valid string or a list, not None",
    "base_model=5": "base_model: input should be a valid string or a mapping, not 5",
    "cluster.kind=k8s": "cluster.kind: 'k8s' is none of 'local', 'address', 'kubernetes'",
    "tracking.mode=always": "tracking.mode: input should be 'auto', 'online' or 'offline', not 'always'",
    "stages.vocabulary=3": "stages.vocabulary: input should be a mapping, not 3",
    "stages.attention.method.dropout=1.0": "stages.attention.method.dropout: input should be less than 1, not 1.0",
    "stages.attention.method.targets=[]": "stages.attention.method.targets: is empty",
    "stages.attention.method.rank=eight": (
        "stages.attention.method.rank: input should be a valid integer, unable to parse string as an integer, not 'eight'"
    ),
    "stages.attention.modules_to_save=[norm]": (
        "stages.attention.modules_to_save.0: input should be 'embed_tokens' or 'lm_head', not 'norm'"
    ),
    "stages.export.kind=exprt": (
        "stages.export.kind: 'exprt' is none of 'vocabulary', 'train', 'merge', 'export', 'evaluate'"
    ),
    "stages.instruct.epochs=1": "stages.instruct: give either `steps` or `epochs`",
    "stages.attention.quantization=nf3": (
        "stages.attention.quantization.kind: input should be 'nf4', 'fp4' or 'int8', not 'nf3'"
    ),
    "stages.embeddings.modules_to_save=[]": (
        "stages.embeddings: nothing to train; give `method`, `modules_to_save` or `new_rows`"
    ),
}


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_no_plus_smuggles_an_unknown_key_past_the_schema(prefix: str) -> None:
    found = problems(*(prefix + word for word in UNKNOWN_KEYS))
    assert set(found) == {f"{message} (set by the override {prefix}{word})" for word, message in UNKNOWN_KEYS.items()}
    assert len(found) == len(UNKNOWN_KEYS)


def test_an_unknown_key_like_no_other_gets_the_list() -> None:
    assert problems("cluster=address", "cluster.gpus=2") == (
        "cluster.gpus: no such key; choose from accelerator_type, address, code, cpus_per_worker, kind, labels, placement, "
        "resources (set by the override cluster.gpus=2)",
    )


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "recipe=chinese_lama",
            "recipe: 'chinese_lama' is none of chinese_llama, chinese_llama_published, intrinsic_dimension, "
            "method_comparison; did you mean chinese_llama?",
        ),
        ("scale=8b", "scale: '8b' is none of 13b, 33b, 7b, demo"),
        (
            "cluster=loca",
            "cluster: 'loca' is none of address, address_8gpu, kubernetes, kubernetes_8gpu, local; did you mean local?",
        ),
        ("tracking=tensorboard", "tracking: 'tensorboard' is none of none, wandb"),
        (
            "train@stages.attention=mpl",
            "train: 'mpl' is none of answers, attention, attention_and_mlp, embeddings, mlp; did you mean mlp?",
        ),
    ],
)
def test_an_unknown_choice_of_a_group_is_named_with_the_nearest(word: str, message: str) -> None:
    assert problems(word) == (message,)


def test_all_bad_values_come_at_once_each_with_its_path_and_its_override() -> None:
    found = problems(*BAD_VALUES)
    assert set(found) == {f"{message} (set by the override {word})" for word, message in BAD_VALUES.items()}
    assert len(found) == len(BAD_VALUES)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("base_model.num_heads=3", "base_model: hidden_size 128 is not divisible by 3"),
        ("run_root=${nope}", "run_root: Interpolation key 'nope' not found"),
        ("stages.attention.steps=null", "stages.attention: give either `steps` or `epochs`"),
    ],
)
def test_a_contradiction_is_named_with_its_path_and_its_override(word: str, message: str) -> None:
    assert problems(word) == (f"{message} (set by the override {word})",)


def test_the_last_of_two_overrides_is_blamed() -> None:
    assert problems("seed=-1", "seed=-2")[0].endswith("not -2 (set by the override seed=-2)")


def test_a_contradiction_among_words_names_every_override_of_its_stage() -> None:
    words = ("stages.attention.global_batch_size=10", "stages.attention.learning_rate=1", "seed=3")
    (message,) = problems(*words)
    assert message.endswith(f"not divisible by resources.micro_batch_size 4 (set by the override {words[0]} {words[1]})")


@pytest.mark.parametrize("word", ["seed", "=3", "+", ""])
def test_a_word_that_sets_nothing_is_refused(word: str) -> None:
    assert problems("stage=2", word) == (f"{word}: sets nothing; write key=value, such as stage=2",)


def test_a_word_that_hydra_cannot_read_is_named_and_reads_once_quoted() -> None:
    assert problems("seed=2", "text=a=b.txt") == (
        "text=a=b.txt: cannot be read; quote special characters, twice for the shell: \"key='a=b'\"",
    )
    assert compose(["text='a=b.txt'"]).text == ("a=b.txt",)


def test_a_list_without_its_brackets_is_shown_with_them() -> None:
    assert problems("stage=1,2") == ("stage=1,2: a list is written stage=[1,2], with quotes for the shell",)


@pytest.mark.parametrize("path", ["name", "base_model", "stages", "stages.attention.block_length", "cluster.kind"])
def test_what_is_required_cannot_be_left_out(path: str) -> None:
    assert problems(f"~{path}") == (f"{path}: is required and not set",)


def test_what_no_file_and_no_word_sets_is_required() -> None:
    assert problems("base_model=???") == ("base_model: is required and not set",)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "config.yaml",
            "seed: 1",
            "seed: one",
            "seed: input should be a valid integer, unable to parse string as an integer, not 'one'",
        ),
        (
            "tracking/wandb.yaml",
            "kind: wandb",
            "kind: wandb\nprojct: x",
            "tracking.projct: no such key; did you mean project?",
        ),
        (
            "scale/demo.yaml",
            "num_heads: 8",
            "num_heads: none",
            "base_model.num_heads: input should be a valid integer, unable to parse string as an integer, not 'none'",
        ),
        (
            "train/attention.yaml",
            "rank: 8",
            "rnk: 8",
            "stages.attention.method.rnk: no such key; did you mean rank?",
        ),
        (
            "train/attention.yaml",
            "weight_decay: 0.01",
            "weight_decay: -0.01",
            "stages.attention.weight_decay: input should be greater than or equal to 0, not -0.01",
        ),
        (
            "export/merged.yaml",
            "merged: true",
            "merged: yes please",
            "stages.export.merged: input should be a valid boolean, unable to interpret input, not 'yes please'",
        ),
    ],
)
def test_a_bad_value_in_a_file_names_the_file(recipes: Path, file: str, old: str, new: str, message: str) -> None:
    replace_once(recipes / file, old, new)
    assert f"{message} (set in recipes/{file})" in problems(folder=recipes)


def test_of_two_files_the_one_whose_value_counts_is_named(recipes: Path) -> None:
    with (recipes / "scale/demo.yaml").open("a", encoding="utf-8") as file:
        file.write("precision: fp8\n")
    (message,) = problems(folder=recipes)
    assert message == "precision: input should be 'bf16', 'fp16' or 'fp32', not 'fp8' (set in recipes/scale/demo.yaml)"


def test_a_contradiction_between_files_names_them_all(recipes: Path) -> None:
    replace_once(recipes / "train/embeddings.yaml", "steps: 3000", "epochs: 2")
    (message,) = problems(folder=recipes)
    files = "recipes/train/embeddings.yaml, recipes/budget/chinese_llama/demo.yaml"
    assert message == f"stages.embeddings: give either `steps` or `epochs` (set in {files})"


def test_a_file_that_is_put_twice_is_named_for_both_stages(recipes: Path) -> None:
    replace_once(recipes / "train/attention.yaml", "weight_decay: 0.01", "weight_decay: -1")
    found = problems("train@stages.instruct=attention", folder=recipes)
    assert [message.partition(":")[0] for message in found] == [
        f"stages.{name}.weight_decay" for name in ("attention", "instruct")
    ]
    assert all(message.endswith("(set in recipes/train/attention.yaml)") for message in found)


def test_an_override_is_blamed_before_a_file_that_sets_the_same() -> None:
    assert problems("stages.attention.weight_decay=-1")[0].endswith("(set by the override stages.attention.weight_decay=-1)")


def test_a_file_that_is_not_yaml_is_named_with_its_line(recipes: Path) -> None:
    replace_once(recipes / "train/attention.yaml", "kind: train", "kind: [train")
    (message,) = problems(folder=recipes)
    assert "train/attention.yaml" in message
    assert "line 3" in message


@pytest.mark.parametrize(
    ("word", "stage"),
    [
        ("stage=2", 2),
        ("stage=attention", "attention"),
        ("stage=1-3", "1-3"),
        ("stage=all", "all"),
        ("stage=[1,attention,3-4]", (1, "attention", "3-4")),
    ],
)
def test_every_form_of_stage_selection_is_accepted(word: str, stage: Any) -> None:
    assert compose([word]).stage == stage


def test_a_path_replaces_the_random_base() -> None:
    assert isinstance(compose([]).base_model, RandomBase)
    assert compose(["base_model=/models/llama"]).base_model == "/models/llama"


def test_a_deleted_stage_is_gone_and_the_others_keep_their_order() -> None:
    assert list(compose([]).stages) == [*compose(["~stages.export"]).stages, "export"]


def test_a_stage_can_be_added_and_exchanged() -> None:
    recipe = compose(["+train@stages.more=mlp", "train@stages.attention=mlp"])
    assert list(recipe.stages)[-1] == "more"
    assert train_stage(recipe, "more").objective == train_stage(recipe, "attention").objective == "answers"


def test_a_key_that_no_file_sets_needs_no_plus() -> None:
    recipe = compose(["cluster.gpus=2", "tracking.mode=offline", "stages.attention.resources.micro_batch_size=2"])
    assert recipe.cluster == LocalCluster(kind="local", gpus=2)
    assert recipe.tracking == WandbTracking(kind="wandb", mode="offline")
    assert train_stage(recipe, "attention").resources.micro_batch_size == 2


def test_a_single_source_needs_no_list() -> None:
    assert compose(["text=a.txt"]).text == ("a.txt",)


def test_only_plain_frozen_values_leave() -> None:
    recipe = compose(["text=[a.txt,b.txt]", "stage=[1,2]"])
    leaves = list(leaves_of(recipe))
    assert len(leaves) > 80
    assert {type(leaf) for leaf in leaves} <= {str, int, float, bool, type(None)}
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 2  # pyrefly: ignore[read-only]


def leaves_of(value: object) -> Iterator[object]:
    assert not isinstance(value, DictConfig | ListConfig)
    match value:
        case BaseModel():
            for name in type(value).model_fields:
                yield from leaves_of(getattr(value, name))
        case dict():
            for key, inner in value.items():
                yield from leaves_of(key)
                yield from leaves_of(inner)
        case tuple():
            for inner in value:
                yield from leaves_of(inner)
        case _:
            yield value


def test_a_password_in_a_url_is_not_repeated() -> None:
    for word in ("seed=s3://ana:geheim@bucket/runs?token=abc", "seed='s3://ana:geheim@bucket/runs?token=abc'"):
        (message,) = problems(word)
        assert "s3://…" in message
        assert "geheim" not in message
        assert "abc" not in message


@pytest.mark.parametrize(("word", "workers"), [("workers=3", 3), ("workers=2-8", Range(fewest=2, most=8))])
def test_workers_are_a_number_or_a_range(word: str, workers: int | Range) -> None:
    recipe = compose([word])
    assert recipe.workers == workers
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize("given", ["8-2", "0-2", "two", "-1", "2.5", "true"])
def test_workers_of_another_kind_are_refused_with_both_forms(given: str) -> None:
    (message,) = problems(f"workers={given}")
    assert message.startswith("workers: input should be a number above 0, or a range of two such as 2-8, not ")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["stages.instruct.method=full"], "method: full trains every weight; leave out modules_to_save and new_rows"),
        (
            ["stages.instruct.method=ia3", "stages.instruct.quantization=nf4"],
            "quantization: ia3 does not go with it",
        ),
        (
            ["stages.instruct.method=full", "stages.instruct.modules_to_save=[]", "stages.instruct.quantization=nf4"],
            "quantization: weights in a few bits cannot learn",
        ),
        (["stages.attention.method.init=pissa", "stages.attention.quantization=int8"], "quantization: what pissa leaves"),
        (
            ["stages.attention.method.init=pissa", "stages.attention.method.dora=true"],
            "dora and init: pissa do not go",
        ),
        (["stages.attention.method.init=loftq"], "method.init: loftq begins with what quantization takes"),
        (
            ["stages.instruct.optimizer=sgd"],
            "optimizer: input should be 'adamw', 'adamw_8bit', 'paged_adamw' or 'paged_adamw_8bit', not 'sgd'",
        ),
        (["stages.instruct.method=prompt_tuning"], "method: prompt_tuning leaves the model as it is"),
        (["stages.instruct.method=bottleneck"], "method: bottleneck leaves the model as it is"),
        (
            ["stages.instruct.method=prompt_tuning", "stages.instruct.modules_to_save=[]"],
            "method: prompt_tuning puts virtual tokens before a row, which must be one sample; set packing=false",
        ),
        (
            [
                "stages.attention.method=prefix_tuning",
                "stages.attention.modules_to_save=[]",
                "stages.attention.resources.gradient_checkpointing=true",
            ],
            "method: prefix_tuning hands keys and values to every layer",
        ),
        (["stages.instruct.method={kind: ia3, targets: [k_proj], feedforward: [up_proj]}"], "feedforward: up_proj is none"),
    ],
)
def test_what_does_not_go_together_in_a_stage_is_said(words: list[str], problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compose(words)
    (found,) = caught.value.problems
    assert problem in found
    assert found.startswith("stages.")


def test_a_sweep_is_every_combination_in_the_order_of_hydras_own() -> None:
    found = sweep(["seed=1,2", "recipe=chinese_llama", "stages.attention.steps=range(1,4)", "text=[a,b]"])
    assert found.swept == ["seed", "stages.attention.steps"]
    assert len(found.combinations) == 6
    assert found.combinations[0] == ["seed=1", "recipe=chinese_llama", "stages.attention.steps=1", "text=[a,b]"]
    assert [words[2][-1] for words in found.combinations] == ["1", "2", "3", "1", "2", "3"]
    for words in found.combinations:
        compose(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=1"], "no word has several values"),
        (["stages.attention.learning_rate=interval(0,1)"], "give values"),
        (["seed=1,[2"], "seed=1,\\[2: cannot be read"),
    ],
)
def test_what_is_no_sweep_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        sweep(words)
