"""Before anything trains: every node has the same code and versions, sees the files, and can write to the run root."""

import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster.code import code_hash
from orchestrator.cluster.failures import cause_of
from orchestrator.cluster.node_facts import Facts, facts_here, unlike
from orchestrator.environment import versions
from orchestrator.errors import StorageError
from orchestrator.run_root import RunRoot

_SECONDS = 120
"""A node that does not answer for so long is not asked any more."""


@dataclass(frozen=True)
class Expected:
    """What this machine has, and every other must have, too."""

    root: RunRoot
    probe: str
    """A file in the run root that was just written here."""
    files: tuple[Path, ...]
    """What is read where it lies: the base model, data, tokenizers."""
    code: str
    versions: Mapping[str, str]


def check_nodes(root: RunRoot, files: Sequence[Path]) -> tuple[dict[str, Facts], list[str]]:
    """What each node has, and what is wrong on which of them, all at once; one that is lost meanwhile is not counted."""
    probe = f".probe-{uuid.uuid4().hex}"
    expected = Expected(root, probe, tuple(files), code_hash(), versions())
    content = b"" if root.url else None
    if content is None:
        (root.local / probe).touch()
    else:
        root.write(probe, content)
    try:
        facts, problems = _ask_all(expected)
    finally:
        (root.local / probe).unlink(missing_ok=True)
        root.delete(probe)
    return facts, problems + unlike(facts)


def look_around(expected: Expected) -> tuple[Facts, list[str]]:
    """What this node has, and what is wrong there."""
    problems = [*_different(expected), *_unseen(expected.files), *_root_problems(expected)]
    return facts_here(expected.root.local), problems


def _ask_all(expected: Expected) -> tuple[dict[str, Facts], list[str]]:
    asked, counted = {}, {}
    for node in ray.nodes():
        # A head without work of its own never runs a rank, and need not see anything.
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1:
            options: dict[str, Any] = {
                "num_cpus": 0,
                "max_retries": 0,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            }
            task = ray.remote(**options)(look_around)
            asked[task.remote(expected)] = node["NodeManagerAddress"]
            counted[node["NodeManagerAddress"]] = int(node["Resources"].get("GPU", 0))
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=_SECONDS) if asked else ([], [])
    problems = [f"node {asked[ref]}: did not answer for {_SECONDS} seconds" for ref in late]
    facts: dict[str, Facts] = {}
    for ref in ready:
        try:
            there, found = ray.get(ref)
            facts[asked[ref]] = replace(there, counted=counted[asked[ref]])
            problems += [f"node {asked[ref]}: {problem}" for problem in found]
        except ray.exceptions.RayTaskError as error:
            problems.append(f"node {asked[ref]}: {cause_of(error)}")
        except ray.exceptions.RayError as error:
            if not isinstance(error, ray.exceptions.NodeDiedError | ray.exceptions.TaskUnschedulableError):
                problems.append(f"node {asked[ref]}: {error}")
    return dict(sorted(facts.items())), sorted(problems)


def _different(expected: Expected) -> list[str]:
    found = []
    if code_hash() != expected.code:
        where = Path(__file__).resolve().parents[2]
        found.append(f"its code ({where}) is not this command's; install the same, or say cluster.code=ship")
    for name, version in versions().items():
        # What follows the + is how it was built, for CPUs or some CUDA.
        if version.partition("+")[0] != expected.versions[name].partition("+")[0]:
            found.append(f"{name} is {version} there and {expected.versions[name]} here; install constraints.txt on both")
    return found


def _unseen(files: Sequence[Path]) -> list[str]:
    return [
        f"cannot read {file}; put it where all nodes see it (what comes from the hub: HF_HOME), or name it by URL"
        for file in files
        if not os.access(file, os.R_OK)
    ]


def _root_problems(expected: Expected) -> list[str]:
    root, remedy = expected.root, "give a folder that all nodes mount, or an object store such as s3://bucket/runs"
    if root.url:
        try:
            seen = root.read(expected.probe) is not None
        except StorageError as error:
            return [f"run_root: {error}; its credentials come from the environment of Ray on that node"]
        return [] if seen else [f"run_root: {root.url} is another there; {remedy}"]
    if not (root.local / expected.probe).is_file():
        return [f"run_root: {root.local} is not the folder that this command sees; {remedy}"]
    own = root.local / f"{expected.probe}-{uuid.uuid4().hex}"
    try:
        own.touch()
    except OSError as error:
        return [f"run_root: {root.local} cannot be written to ({error.strerror}); {remedy}"]
    finally:
        with suppress(OSError):
            own.unlink(missing_ok=True)
    return []
