"""KubeRay's own samples pass the schema and the operator's rules, as they must; they are no part of this project."""

import os
from pathlib import Path

import pytest
import yaml

from orchestrator.rayjob.crd import read_schema, schema_problems
from orchestrator.rayjob.rules import operator_problems
from tests.unit.rayjob.manifests import crd

_FOLDER = os.environ.get("KUBERAY_SAMPLES", "")
"""`ray-operator/config/samples` of a checkout of KubeRay."""


@pytest.mark.skipif(not _FOLDER, reason="KUBERAY_SAMPLES names no folder of KubeRay's samples")
def test_the_official_samples_are_taken() -> None:
    schema, jobs = read_schema(crd()), 0
    for path in sorted(Path(_FOLDER).rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if document and (document.get("kind"), document.get("apiVersion")) == ("RayJob", "ray.io/v1"):
                jobs += 1
                assert schema_problems(document, schema) + operator_problems(document) == [], path
    assert jobs >= 4


def job(**spec: object) -> dict:
    """Little more than a job must have, and nothing that has a default."""
    pod = {"template": {"spec": {"containers": [{"name": "ray", "image": "rayproject/ray:2.60.0"}]}}}
    cluster = {"headGroupSpec": pod, "workerGroupSpecs": [{"groupName": "workers", **pod}]}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"generateName": "mine-"},
        "spec": {"rayClusterSpec": cluster, **spec},
    }


@pytest.mark.parametrize(
    "spec",
    [
        {"entrypoint": "python a.py"},
        {"submissionMode": "InteractiveMode", "jobId": ""},
        {"submissionMode": "SidecarMode", "entrypoint": "python a.py"},
        {"submissionMode": "HTTPMode", "entrypoint": "python a.py", "shutdownAfterJobFinishes": True, "suspend": True},
        {
            "entrypoint": "|\n  python a.py",
            "deletionStrategy": {
                "deletionRules": [
                    {"policy": policy, "condition": {"jobStatus": "FAILED", "ttlSeconds": seconds}}
                    for policy, seconds in (("DeleteWorkers", 1), ("DeleteCluster", 2), ("DeleteSelf", 3))
                ]
            },
        },
    ],
    ids=["plain", "interactive", "sidecar", "suspended", "rules"],
)
def test_whatever_kuberay_takes_is_taken(spec: dict) -> None:
    assert schema_problems(job(**spec), read_schema(crd())) + operator_problems(job(**spec)) == []
