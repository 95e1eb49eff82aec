"""A recipe of five stages and its contents, all literal: planning needs no file, no Hydra and no torch."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from orchestrator.plan.plan import Contents, PlannedStage
from orchestrator.plan.record import Record, commit
from orchestrator.schema import Recipe
from tests.llama_layers import LAYERS

LORA = {"kind": "lora", "rank": 8, "alpha": 32, "dropout": 0.05}
TRAIN = {"kind": "train", "block_length": 64, "global_batch_size": 16, "steps": 10, "learning_rate": 1e-4}
VALUES: dict[str, Any] = {
    "name": "laptop",
    "base_model": "/models/base",
    "text": ["text.jsonl"],
    "instructions": ["instructions.json"],
    "stages": {
        "vocabulary": {"kind": "vocabulary", "pieces": 100},
        "embeddings": TRAIN | {"objective": "next_token", "modules_to_save": ["embed_tokens"]},
        "attention": TRAIN | {"objective": "next_token", "method": LORA | {"targets": ["q_proj", "v_proj"]}},
        "instruct": TRAIN
        | {
            "objective": "answers",
            "method": LORA | {"targets": ["up_proj"]},
            "modules_to_save": ["embed_tokens", "lm_head"],
        },
        "export": {"kind": "export"},
    },
    "cluster": {"kind": "local"},
    "tracking": {"kind": "none"},
}

MakeRecipe = Callable[[Mapping[str, Any]], Recipe]


@pytest.fixture
def make_recipe() -> MakeRecipe:
    """The recipe with other values at some dotted paths; None takes a stage out."""

    def make(changes: Mapping[str, Any]) -> Recipe:
        values = copy.deepcopy(VALUES)
        for path, value in changes.items():
            *parents, last = path.split(".")
            node = values
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        values["stages"] = {name: stage for name, stage in values["stages"].items() if stage is not None}
        return Recipe.model_validate(values)

    return make


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Recipe:
    return make_recipe({})


@pytest.fixture
def contents() -> Contents:
    return Contents(
        base_model="b" * 64,
        base_tokenizer="c" * 64,
        linear_layers=LAYERS,
        data={"vocabulary": "1" * 64, "embeddings": "1" * 64, "attention": "1" * 64, "instruct": "2" * 64},
    )


@pytest.fixture
def finish() -> Callable[[PlannedStage], Record]:
    """Commits a stage with an artifact of one file."""

    def commit_stage(planned: PlannedStage) -> Record:
        planned.folder.mkdir(parents=True)
        (planned.folder / "artifact").write_text(planned.name)
        record = Record(
            stage=planned.name,
            kind=planned.stage.kind,
            fingerprint=planned.fingerprint,
            identity=planned.identity,
            parents=planned.parents,
            recipe={},
            results={},
            environment={},
        )
        return commit(planned.folder, record)

    return commit_stage
