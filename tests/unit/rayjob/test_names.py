"""A pipeline's name: the same for the same pipeline, another for another, and always one that Kubernetes takes."""

import re

import pytest

from orchestrator.compose import compose
from orchestrator.rayjob.names import MAX_NAME, job_labels, job_name, pipeline_fingerprint
from orchestrator.schema import Recipe

WORDS = ("recipe=chinese_llama", "stage=2", "cluster=kubernetes")


def recipe(*more: str) -> Recipe:
    return compose([*WORDS, *more])


@pytest.mark.parametrize(
    "more",
    [
        ("cluster.nodes=8",),
        ("workers=4", "zero=3"),
        ("tracking=none",),
        ("recovery.max_failures=9", "checkpoint.keep=5", "supervise=true"),
        ("stages.attention.resources.micro_batch_size=2",),
        ("stage=attention",),
        ("cluster=kubernetes_8gpu",),
    ],
    ids=" ".join,
)
def test_how_it_is_computed_is_no_part_of_it(more: tuple[str, ...]) -> None:
    assert pipeline_fingerprint(recipe(*more)) == pipeline_fingerprint(recipe())


@pytest.mark.parametrize(
    "more",
    [
        ("stage=3",),
        ("seed=2",),
        ("stages.attention.learning_rate=3e-4",),
        ("run_root=s3://b/r",),
        ("scale=7b",),
        ("text=sample:text_english.jsonl",),
    ],
    ids=" ".join,
)
def test_what_is_learned_and_where_it_is_kept_are(more: tuple[str, ...]) -> None:
    assert pipeline_fingerprint(recipe(*more)) != pipeline_fingerprint(recipe())


@pytest.mark.parametrize("name", ["chinese_llama", "7B Modell", "语言", "x" * 100, "A.b_C", "-"])
@pytest.mark.parametrize("stage", ["2", "[1,2,3]", "1-3", "all"])
def test_a_name_is_valid_and_short_enough(name: str, stage: str) -> None:
    found = recipe(f"stage={stage}").model_copy(update={"name": name})
    assert len(job_name(found)) <= MAX_NAME == 47
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job_name(found))
    for value in job_labels(found).values():
        assert re.fullmatch(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?", value)
        assert len(value) <= 63


def test_labels_say_pipeline_stage_and_fingerprint() -> None:
    labels = job_labels(recipe())
    assert (labels["orchestrator/pipeline"], labels["orchestrator/stage"]) == ("chinese_llama", "2")
    assert labels["orchestrator/fingerprint"] == pipeline_fingerprint(recipe())
    assert job_name(recipe()) == f"chinese-llama-2-{labels['orchestrator/fingerprint']}"
