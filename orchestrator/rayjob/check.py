"""Everything that is wrong with a RayJob, before anyone is handed it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.rayjob.crd import read_schema, schema_problems
from orchestrator.rayjob.rules import operator_problems
from orchestrator.rayjob.traps import trap_problems

CRD_VARIABLE = "KUBERAY_CRD"
"""Names KubeRay's CustomResourceDefinition of RayJobs, ray.io_rayjobs.yaml, where one is at hand."""


def manifest_problems(manifest: Mapping[str, Any], crd: Path | None) -> list[str]:
    """A line for each, the field first: the CRD's schema, the operator's rules, and the traps that both let through.

    Without `crd` the schema is left to the API server, which is asked before anything is created.
    """
    from_schema = schema_problems(manifest, read_schema(crd)) if crd else []
    found = [*from_schema, *operator_problems(dict(manifest)), *trap_problems(dict(manifest))]
    return list(dict.fromkeys(found))


def crd_at_hand() -> Path | None:
    path = os.environ.get(CRD_VARIABLE)
    return Path(path) if path else None
