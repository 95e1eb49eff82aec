"""A password, key or token in a URL is found wherever in a recipe it stands; what merely looks a little like one is not."""

import pytest

from orchestrator.schema import Recipe
from orchestrator.schema.credentials import fields_with_credentials

TRAIN = {
    "kind": "train",
    "block_length": 8,
    "global_batch_size": 4,
    "steps": 1,
    "learning_rate": 0.1,
    "modules_to_save": ["lm_head"],
}


def recipe_with(**values: object) -> Recipe:
    plain = {"name": "small", "base_model": "base", "cluster": {"kind": "local"}, "tracking": {"kind": "none"}}
    stages = {"head": TRAIN | {"objective": "next_token", "data": values.pop("data", None)}}
    return Recipe.model_validate(plain | {"stages": stages} | values)


CARRYING = [
    "https://user:planted@host/corpus.jsonl",
    "https://user:planted@host:8080/corpus.jsonl",
    "https://:planted@host/corpus.jsonl",
    "s3://AKIA:pla/nted@bucket/corpus",
    "S3://AKIA:planted@bucket/corpus",
    "simplecache::https://user:planted@host/corpus.jsonl",
    "https://hf_planted@host/corpus.jsonl",
    "https://host/corpus.jsonl?token=planted",
    "https://host/corpus.jsonl?download=true&access_token=planted",
    "https://host/corpus.jsonl?X-Amz-Credential=AKIA&X-Amz-Signature=planted",
    "https://host/corpus.jsonl?sv=2024&sig=planted",
    "https://host/corpus.jsonl?api-key=planted",
    "https://host/corpus.jsonl?AWSAccessKeyId=planted",
]
PLAIN = [
    "corpus/user:name@home.jsonl",
    "owner/corpus",
    "~/corpus",
    "hf://datasets/owner/corpus@main/text.jsonl",
    "s3://bucket/corpus/2024:01@night.jsonl",
    "http://host:8080/corpus@2.jsonl",
    "abfss://container@account.dfs.core.windows.net/corpus",
    "sftp://user@host/corpus",
    "https://host/corpus.jsonl?download=true&design=1",
]


@pytest.mark.parametrize("url", CARRYING)
def test_credentials_in_a_url_are_found(url: str) -> None:
    assert fields_with_credentials(recipe_with(text=["corpus", url])) == ("text",)


@pytest.mark.parametrize("url", PLAIN)
def test_other_sources_pass(url: str) -> None:
    assert fields_with_credentials(recipe_with(text=[url], base_model=url, run_root=url)) == ()


def test_every_text_of_a_recipe_is_looked_at() -> None:
    url = CARRYING[0]
    recipe = recipe_with(
        base_model=url,
        validation=url,
        retention={"text": url, "max_rise": 1},
        data=url,
        run_root=url,
        cluster={"kind": "address", "address": url},
        tracking={"kind": "wandb", "project": url},
    )
    named = {
        "base_model",
        "validation",
        "retention.text",
        "stages.head.data",
        "run_root",
        "cluster.address",
        "tracking.project",
    }
    assert set(fields_with_credentials(recipe)) == named
