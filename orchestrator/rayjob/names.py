"""What a RayJob is called and labelled: the same pipeline has the same name, so that handing it in twice finds the first."""

import re

from orchestrator.plan.selection import selected_stages
from orchestrator.schema import Recipe
from orchestrator.store import sha256_value

MAX_NAME = 47
"""KubeRay appends to it for the cluster's name, which has at most 53 characters and must fit into a label."""
PREFIX = "orchestrator/"
MANAGED_BY = {"app.kubernetes.io/managed-by": "orchestrator"}
"""All that is ours."""
_NOT_LEARNED = {"cluster", "tracking", "workers", "zero", "checkpoint", "recovery", "supervise", "stage"}
_DIGITS = 12


def pipeline_fingerprint(recipe: Recipe) -> str:
    """12 hex over what is learned and where it is kept, by its words: the files behind them may lie out of reach here.

    Where and how it is computed is no part of it.
    """
    said = recipe.model_dump(mode="json", exclude=_NOT_LEARNED)
    for stage in said["stages"].values():
        stage.pop("resources", None)
        stage.pop("log_every_steps", None)
    said["stage"] = list(selected_stages(recipe.stage, tuple(recipe.stages)))
    return sha256_value(said)[:_DIGITS]


def job_name(recipe: Recipe) -> str:
    """A DNS-1035 label of at most 47 characters, such as chinese-llama-2-0f3a…"""
    fingerprint = pipeline_fingerprint(recipe)
    readable = re.sub(r"[^a-z0-9]+", "-", f"{recipe.name}-{_stage(recipe)}".lower()).strip("-")
    if not readable[:1].isalpha():
        readable = f"r-{readable}".strip("-")
    return f"{readable[: MAX_NAME - _DIGITS - 1].rstrip('-')}-{fingerprint}"


def job_labels(recipe: Recipe) -> dict[str, str]:
    """What a job, and each of its pods, says of itself; by these it is found again."""
    return {
        **MANAGED_BY,
        "app.kubernetes.io/name": "orchestrator",
        f"{PREFIX}pipeline": _label_value(recipe.name),
        f"{PREFIX}stage": _label_value(_stage(recipe)),
        f"{PREFIX}fingerprint": pipeline_fingerprint(recipe),
    }


def _stage(recipe: Recipe) -> str:
    """As it was typed."""
    return "-".join(map(str, recipe.stage)) if isinstance(recipe.stage, tuple) else str(recipe.stage)


def _label_value(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)[:63].strip("-_.")
