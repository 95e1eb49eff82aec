"""Manifests to test with: those of the project's own recipes, and mistakes planted into them."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.compose import compose
from orchestrator.rayjob.build import build_rayjob
from orchestrator.rayjob.job import RayJob
from orchestrator.schema import KubernetesCluster, Recipe
from tests.shared_data import SHARED

_CRD = Path(os.environ.get("KUBERAY_CRD") or SHARED / "kuberay" / "ray.io_rayjobs.yaml")
MISSING = object()
"""Planted in the place of a value that is taken out."""


def crd() -> Path:
    if not _CRD.is_file():
        pytest.skip(f"{_CRD} is missing; KUBERAY_CRD names KubeRay's ray.io_rayjobs.yaml")
    return _CRD


def recipe_of(*words: str) -> tuple[Recipe, KubernetesCluster]:
    recipe = compose(words)
    assert isinstance(recipe.cluster, KubernetesCluster)
    return recipe, recipe.cluster


def job_of(words: tuple[str, ...]) -> RayJob:
    return build_rayjob(*recipe_of(*words), words)


def manifest_of(*words: str) -> dict[str, Any]:
    return job_of(words or ("recipe=chinese_llama", "stage=2", "cluster=kubernetes")).as_manifest()


def planted(manifest: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a path such as spec.rayClusterSpec.workerGroupSpecs.0.groupName."""
    changed = copy.deepcopy(manifest)
    *outer, last = path.split(".")
    place: Any = changed
    for part in outer:
        place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
    if value is MISSING:
        del place[last]
    elif isinstance(place, list):
        place[int(last) : int(last) + 1] = [value]
    else:
        place[last] = value
    return changed
