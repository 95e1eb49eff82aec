"""Every recipe composes, validates and plans, and no file lies about unused."""

from itertools import product
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from orchestrator.compose import CONFIG_NAME, RECIPES_FOLDER, compose
from orchestrator.plan.plan import Contents, State, make_plan
from orchestrator.plan.variants import variants
from orchestrator.schema import FullFineTuning, Lora, RandomBase, Recipe, Subspace, TrainStage
from tests.llama_layers import LAYERS

FILES = sorted(path.relative_to(RECIPES_FOLDER) for path in RECIPES_FOLDER.rglob("*.y*ml"))
NUM_FILES = 41
CHINESE_LLAMA = ("chinese_llama", "chinese_llama_published")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (RECIPES_FOLDER / group).glob("*.yaml"))


COMPOSITIONS = [
    *([f"recipe={recipe}", f"scale={scale}"] for recipe, scale in product(options("recipe"), options("scale"))),
    *([f"{group}={option}"] for group in ("cluster", "tracking") for option in options(group)),
]


def files_behind(words: list[str]) -> set[Path]:
    """The files that a composition reads, with those that the chosen ones extend."""
    with initialize_config_dir(version_base="1.3", config_dir=str(RECIPES_FOLDER)):
        choices = hydra_compose(CONFIG_NAME, words, return_hydra_config=True).hydra.runtime.choices
    chosen = {Path(group.partition("@")[0]) / f"{choice}.yaml" for group, choice in choices.items()} & set(FILES)
    return {Path(f"{CONFIG_NAME}.yaml"), *chosen, *(base for file in chosen for base in extended_by(file))}


def extended_by(file: Path) -> set[Path]:
    defaults = OmegaConf.select(OmegaConf.load(RECIPES_FOLDER / file), "defaults", default=[])
    return {file.with_name(f"{entry}.yaml") for entry in defaults if isinstance(entry, str) and entry != "_self_"}


def train_stages(recipe: Recipe) -> dict[str, TrainStage]:
    return {name: stage for name, stage in recipe.stages.items() if isinstance(stage, TrainStage)}


def test_every_file_is_reached_by_a_composition() -> None:
    assert len(FILES) == NUM_FILES
    reached = set().union(*(files_behind(words) for words in COMPOSITIONS))
    assert set(FILES) - reached == set()


def test_every_recipe_is_tried_at_every_scale() -> None:
    assert len(COMPOSITIONS) == 4 * 4 + 5 + 2


@pytest.mark.parametrize("words", COMPOSITIONS, ids=" ".join)
def test_a_composition_validates_and_plans(words: list[str], tmp_path: Path) -> None:
    recipe = compose(words)
    contents = Contents(
        "b" * 64, "c" * 64, {name: "d" * 64 for name in recipe.stages if name != "export"}, linear_layers=LAYERS
    )
    plan = make_plan(recipe, contents, tmp_path / "runs")
    assert [planned.name for planned in plan.stages] == list(recipe.stages)
    assert {planned.state for planned in plan.stages} == {State.RUN}
    assert {planned.reason for planned in plan.stages} == {"new"}
    assert len({planned.fingerprint for planned in plan.stages}) == len(plan.stages)


@pytest.mark.parametrize("scale", options("scale"))
@pytest.mark.parametrize("name", CHINESE_LLAMA)
def test_the_chinese_llama_stages_are_numbered_as_published(name: str, scale: str) -> None:
    stages = list(compose([f"recipe={name}", f"scale={scale}"]).stages)
    assert stages == ["vocabulary", "embeddings", "attention", "instruct", "export"]


@pytest.mark.parametrize("name", CHINESE_LLAMA)
def test_the_budget_at_7b_is_the_published_one(name: str) -> None:
    """Cui et al. 2023, Efficient and Effective Text Encoding for Chinese LLaMA and Alpaca, and the authors' scripts."""
    recipe = compose([f"recipe={name}", "scale=7b"])
    stages = train_stages(recipe)
    assert recipe.base_model == "huggyllama/llama-7b"
    packing = name == "chinese_llama"
    assert stages["instruct"].packing == packing
    # Packed, about four instructions share a sequence.
    assert [stage.global_batch_size for stage in stages.values()] == [1024, 1024, 128 if packing else 512]
    assert [stage.learning_rate for stage in stages.values()] == [2e-4, 1e-4, 1e-4]
    assert [stages["embeddings"].steps, stages["attention"].steps] == [3000, 6000]
    assert [stage.block_length for stage in stages.values()] == [512] * 3
    assert [stages[name].warmup_fraction for name in ("embeddings", "attention")] == [0.05, 0.05]
    assert [stage.schedule for stage in stages.values()] == ["cosine"] * 3
    assert [stage.objective for stage in stages.values()] == ["next_token", "next_token", "answers"]
    assert stages["embeddings"].method is None
    for lora in (stages["attention"].method, stages["instruct"].method):
        assert isinstance(lora, Lora)
        assert (lora.rank, lora.alpha, lora.dropout) == (8, 32, 0.05)


def test_each_stage_trains_what_its_authors_trained() -> None:
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp = ("gate_proj", "up_proj", "down_proj")
    for name, instruct in (("chinese_llama", mlp), ("chinese_llama_published", (*attention, *mlp))):
        stages = train_stages(compose([f"recipe={name}", "scale=7b"]))
        assert [stage.method.targets if isinstance(stage.method, Lora) else () for stage in stages.values()] == [
            (),
            attention,
            instruct,
        ]
        saved = [stage.modules_to_save for stage in stages.values()]
        assert saved == [("embed_tokens",), ("embed_tokens", "lm_head"), ("embed_tokens", "lm_head")]


def test_scales_differ_in_the_base_and_in_how_it_is_computed_and_not_in_what_is_learned() -> None:
    recipes = [compose([f"scale={scale}"]) for scale in ("7b", "13b", "33b")]
    assert len({str(recipe.base_model) for recipe in recipes}) == 3
    learned = [
        {name: stage.model_dump(exclude={"resources"}) for name, stage in recipe.stages.items()} for recipe in recipes
    ]
    assert learned[0] == learned[1] == learned[2]
    micro_batches = [[stage.resources.micro_batch_size for stage in train_stages(recipe).values()] for recipe in recipes]
    assert micro_batches == [[8] * 3, [4] * 3, [2] * 3]
    assert [recipe.zero for recipe in recipes] == [2, 2, 3]


def test_the_demo_needs_no_download_and_brings_its_own_text() -> None:
    recipe = compose([])
    assert isinstance(recipe.base_model, RandomBase)
    assert recipe.retention is not None
    assert isinstance(recipe.validation, tuple)
    sources = [recipe.text, recipe.instructions, recipe.validation, recipe.retention.text, recipe.base_model.text]
    assert all(sources)
    assert all(str(source).startswith("sample:") for part in sources for source in part)


@pytest.mark.parametrize("scale", options("scale"))
def test_an_intrinsic_dimension_is_measured_in_growing_subspaces_beside_the_whole(scale: str) -> None:
    recipe = compose(["recipe=intrinsic_dimension", f"scale={scale}"])
    assert recipe.compare
    assert (recipe.compare.reference, recipe.compare.reach) == ("full", 0.9)
    methods = {variant.name: train_stages(variant.recipe)["task"].method for variant in variants(recipe)}
    assert methods.pop("full") == FullFineTuning(kind="full")
    for name, method in methods.items():
        assert isinstance(method, Subspace)
        assert name == f"{'said' if method.structure_aware else 'did'}_{method.dimension}"
    sizes = [method.dimension for method in methods.values() if isinstance(method, Subspace) and method.structure_aware]
    assert len(sizes) == 7
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("scale", options("scale"))
def test_a_comparison_differs_in_method_learning_rate_and_seed_alone(scale: str) -> None:
    tried = variants(compose(["recipe=method_comparison", f"scale={scale}"]))
    assert len(tried) == 13 * 3
    assert len({(variant.name, variant.seed) for variant in tried}) == len(tried)
    stages = [train_stages(variant.recipe)["task"] for variant in tried]
    assert len({stage.model_dump_json(exclude={"method", "learning_rate"}) for stage in stages}) == 1
    methods = [stage.method for stage in stages]
    assert all(method is not None for method in methods)
    assert [variant.seed for variant in tried[:4]] == [1, 2, 3, 1]
    assert methods[0] == methods[1] == methods[2] != methods[3]
