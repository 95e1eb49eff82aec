"""The real kubectl on what we write: every recipe at every scale is taken, every overlay builds, mistakes are refused."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.render import OVERLAYS, WORDS, rendered
from orchestrator.compose import RECIPES_FOLDER
from orchestrator.rayjob.check import manifest_problems
from tests.kubernetes.api_server import NAMESPACE, ApiServer
from tests.kubernetes.kinds import KINDS
from tests.kubernetes.kubectl import kubectl
from tests.shared_data import ROOT
from tests.unit.rayjob.manifests import crd, manifest_of, planted
from tests.unit.rayjob.test_mistakes import SCHEMA

_BUILDS = ("one-node", "many-nodes", "kueue", "pvc", "object-store")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (RECIPES_FOLDER / group).glob("*.yaml"))


CASES = list(product(options("recipe"), options("scale"), ("kubernetes", "kubernetes_8gpu")))


def given_data(scale: str) -> list[str]:
    """Where the scale brings none."""
    return [] if scale == "demo" else ["text=hf://datasets/owner/text", "instructions=runs/tasks.json"]


def dry_run(manifest: dict[str, Any], kubeconfig: Path) -> tuple[int, str]:
    arguments = ("create", "--dry-run=server", "--validate=strict", "--filename", "-")
    completed = kubectl(*arguments, kubeconfig=kubeconfig, given=yaml.safe_dump(manifest))
    return completed.returncode, completed.stdout + completed.stderr


def test_there_are_recipes_scales_and_clusters_to_try() -> None:
    assert len(CASES) >= 16


@pytest.mark.parametrize(("recipe", "scale", "cluster"), CASES)
def test_every_recipe_at_every_scale_passes_all_depths(
    recipe: str, scale: str, cluster: str, kubeconfig: Path, server: ApiServer
) -> None:
    manifest = manifest_of(f"recipe={recipe}", f"scale={scale}", f"cluster={cluster}", "stage=1", *given_data(scale))
    assert manifest_problems(manifest, crd()) == []
    code, output = dry_run(manifest, kubeconfig)
    assert code == 0, output
    assert "created (server dry run)" in output
    assert any("fieldValidation=Strict" in path and "dryRun=All" in path for _, path in server.requests)
    assert server.of_kind("rayjobs") == []


@pytest.mark.parametrize(("path", "value", "field"), [pytest.param(*case, id=what) for what, case in SCHEMA.items()])
def test_what_the_schema_forbids_kubectl_refuses_too(path: str, value: Any, field: str, kubeconfig: Path) -> None:
    code, output = dry_run(planted(manifest_of(), path, value), kubeconfig)
    assert code == 1
    assert field.replace(".workerGroupSpecs.0", ".workerGroupSpecs[0]") in output


@pytest.mark.parametrize("overlay", _BUILDS)
def test_every_overlay_builds(overlay: str, tmp_path: Path) -> None:
    built = kubectl("kustomize", f"k8s/overlays/{overlay}", kubeconfig=tmp_path / "none")
    assert built.returncode == 0, built.stderr
    assert len(list(yaml.safe_load_all(built.stdout))) >= 1


@pytest.mark.parametrize("overlay", _BUILDS)
def test_the_objects_of_every_overlay_are_taken(overlay: str, kubeconfig: Path, server: ApiServer) -> None:
    built = kubectl("kustomize", f"k8s/overlays/{overlay}", kubeconfig=kubeconfig)
    assert built.returncode == 0, built.stderr
    objects = list(yaml.safe_load_all(built.stdout))
    assert all(each["metadata"].get("namespace", "orchestrator") == "orchestrator" for each in objects)
    for job in (each for each in objects if each["kind"] == "RayJob"):
        assert manifest_problems(job, crd()) == []
    applied = kubectl("apply", "--server-side", "--validate=strict", "-k", f"k8s/overlays/{overlay}", kubeconfig=kubeconfig)
    assert applied.returncode == 0, applied.stderr
    assert len(objects) > 0
    kinds = {kind.name: kind.plural for kind in KINDS}
    taken = {(plural, name) for plural, _, name in server.objects}
    assert {(kinds[each["kind"]], each["metadata"]["name"]) for each in objects} | {("namespaces", NAMESPACE)} == taken


def test_no_overlay_is_left_out() -> None:
    assert {path.name for path in OVERLAYS.iterdir()} == set(_BUILDS) == {*WORDS, "pvc"}


@pytest.mark.parametrize("overlay", WORDS)
def test_an_overlays_job_is_what_submit_would_render(overlay: str) -> None:
    written = (OVERLAYS / overlay / "rayjob.yaml").read_text(encoding="utf-8")
    assert written == rendered(overlay), "python k8s/render.py writes them anew"


def test_the_image_has_what_the_pods_expect() -> None:
    lines = (ROOT / "k8s" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    sources = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    assert {"constraints.txt", "pyproject.toml", "orchestrator", "recipes", "launch"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{source}" for source in sources} <= set(ignored)
    pod = manifest_of()["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert f"WORKDIR {pod['containers'][0]['workingDir']}" in lines
    assert any(f"--uid {pod['securityContext']['runAsUser']} " in line for line in lines)
    assert "USER orchestrator" in lines
    assert any("--constraint constraints.txt" in line for line in lines)
