"""What KubeRay's operator asks of a RayJob beyond its schema. It takes one that breaks a rule, and fails it minutes later.

The rules are those of version 1.7.0 (ValidateRayJobSpec and what it calls). Its schema's own CEL rules are here, too.
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import yaml

from orchestrator.rayjob.names import MAX_NAME
from orchestrator.rayjob.reading import Group, Node, groups_of

_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_NAME = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_LABEL_PREFIX = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
_DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
_AUTH_VERSION = (2, 52)
_MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")


def operator_problems(manifest: dict[str, Any]) -> list[str]:
    """One line for each rule that is broken, the field first."""
    job = Node(manifest)
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    found = [*_name(job["metadata"]), *_ends(spec), *_deletion(spec), *_submission(spec), *_limits(spec)]
    if not cluster.is_set and not spec["clusterSelector"].is_set:
        found.append(cluster.problem("is not set; a job has either a cluster of its own or a clusterSelector"))
    if cluster.is_set:
        for group in groups_of(cluster):
            found += _group(group)
        found += [*_autoscaling(cluster), *_fault_tolerance(cluster), *_auth(cluster)]
        if cluster["upgradeStrategy"].is_set:
            found.append(cluster["upgradeStrategy"].problem("has no meaning for the cluster of a job; leave it out"))
    return found


def _name(metadata: Node) -> Iterator[str]:
    name = metadata["name"]
    if not name.is_set and metadata["generateName"].is_set:
        return
    if len(name.text) > MAX_NAME:
        yield name.problem(f"{name.text} has {len(name.text)} characters; a RayJob's name has at most {MAX_NAME}")
    if not _DNS_LABEL.fullmatch(name.text):
        yield name.problem(f"{name.text!r} is no DNS label: small letters, digits and -, a letter first, no - at the end")


def _ends(spec: Node) -> Iterator[str]:
    shutdown, seconds = spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"]
    if spec["suspend"].is_set and not shutdown.is_set:
        yield spec["suspend"].problem("needs shutdownAfterJobFinishes: true; suspending deletes the cluster")
    if (seconds.number or 0) < 0:
        yield seconds.problem(f"{seconds.number} is below 0")
    if (seconds.number or 0) > 0 and not shutdown.is_set:
        yield seconds.problem("needs shutdownAfterJobFinishes: true; without it the cluster stays for ever")


def _deletion(spec: Node) -> Iterator[str]:
    strategy, rules = spec["deletionStrategy"], spec["deletionStrategy"]["deletionRules"]
    if strategy.value is None:
        return
    legacy = [strategy[name] for name in ("onSuccess", "onFailure") if strategy[name].is_set]
    if rules.is_set and spec["shutdownAfterJobFinishes"].is_set:
        yield rules.problem("excludes shutdownAfterJobFinishes; the rules say when the cluster goes")
    if rules.is_set and legacy:
        yield legacy[0].problem("excludes deletionRules; leave it out")
    if not rules.is_set and len(legacy) < 2:
        yield strategy.problem("is empty; give deletionRules")
    yield from _deletion_rules(spec, rules)


def _deletion_rules(spec: Node, rules: Node) -> Iterator[str]:
    seconds: dict[str, dict[str, int]] = {}
    for rule in rules.items():
        policy, condition = rule["policy"], rule["condition"]
        job, deployment = condition["jobStatus"].text, condition["jobDeploymentStatus"].text
        if bool(job) == bool(deployment):
            yield condition.problem("wants one of jobStatus and jobDeploymentStatus")
        if (condition["ttlSeconds"].number or 0) < 0:
            yield condition["ttlSeconds"].problem(f"{condition['ttlSeconds'].number} is below 0")
        if spec["clusterSelector"].is_set and policy.text in ("DeleteCluster", "DeleteWorkers"):
            yield policy.problem(f"{policy.text} with a clusterSelector would delete a cluster that is not the job's own")
        if policy.text == "DeleteWorkers" and spec["rayClusterSpec"]["enableInTreeAutoscaling"].is_set:
            yield policy.problem("DeleteWorkers excludes enableInTreeAutoscaling; the autoscaler removes idle workers")
        known = seconds.setdefault(job or deployment, {})
        if policy.text in known:
            yield rule.problem(f"there is a rule for {policy.text} after {job or deployment} already")
        known[policy.text] = condition["ttlSeconds"].number or 0
    for status, known in seconds.items():
        for earlier, later in pairwise(policy for policy in _DELETION_ORDER if policy in known):
            if known[later] < known[earlier]:
                yield rules.problem(
                    f"after {status}, {later} comes at {known[later]} s and so before {earlier} at {known[earlier]} s"
                )


def _submission(spec: Node) -> Iterator[str]:
    mode, selector = spec["submissionMode"].text, spec["clusterSelector"]
    if selector.is_set:
        if not selector["ray.io/cluster"].is_set:
            yield selector.problem("names no cluster; it wants ray.io/cluster")
        for name in ("suspend", "backoffLimit"):
            if spec[name].is_set:
                yield spec[name].problem("excludes clusterSelector, whose cluster is not the job's own")
    if mode == "SidecarMode":
        for name in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
            if spec[name].is_set:
                yield spec[name].problem("excludes submissionMode: SidecarMode, where the submitter lives in the head's pod")
        yield from _must_not_restart(groups_of(spec["rayClusterSpec"])[0], "submissionMode: SidecarMode")
    if mode == "InteractiveMode" and spec["backoffLimit"].is_set:
        yield spec["backoffLimit"].problem("excludes submissionMode: InteractiveMode")
    try:
        environment = yaml.safe_load(spec["runtimeEnvYAML"].text or "{}")
    except yaml.YAMLError as error:
        yield spec["runtimeEnvYAML"].problem(f"is no YAML: {' '.join(str(error).split())}")
    else:
        if not isinstance(environment, dict):
            yield spec["runtimeEnvYAML"].problem("is no mapping of a runtime environment")
    if spec["managedBy"].is_set and spec["managedBy"].text not in _MANAGERS:
        yield spec["managedBy"].problem(f"{spec['managedBy'].text} is none of {', '.join(_MANAGERS)}")


def _limits(spec: Node) -> Iterator[str]:
    for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        seconds = spec[name].number
        if seconds is not None and seconds <= 0:
            yield spec[name].problem(f"{seconds} is not above 0")
    if (spec["backoffLimit"].number or 0) < 0:
        yield spec["backoffLimit"].problem(f"{spec['backoffLimit'].number} is below 0")


def _group(group: Group) -> Iterator[str]:
    node, params = group.node, group.node["rayStartParams"]
    if not group.pod["containers"].is_set:
        yield group.pod["containers"].problem("is empty; a pod has at least one container")
    if node["resources"].is_set and (twice := [name for name in _RESOURCE_PARAMS if params[name].is_set]):
        yield params.problem(f"{', '.join(twice)} and {node['resources'].path} exclude each other; use one of them")
    if "labels" in params.entries():
        yield params["labels"].problem(f"is not allowed; Ray's labels go to {node['labels'].path}")
    for key, value in node["labels"].entries().items():
        prefix, slash, name = key.rpartition("/")
        if len(name) > 63 or not _LABEL_NAME.fullmatch(name) or (slash and not _LABEL_PREFIX.fullmatch(prefix)):
            yield value.problem("is no name of a label: letters, digits, -, _ and ., a prefix before / at most")
        if value.text and (len(value.text) > 63 or not _LABEL_NAME.fullmatch(value.text)):
            yield value.problem(f"{value.text!r} is no value of a label: at most 63 letters, digits, -, _ and .")


def _autoscaling(cluster: Node) -> Iterator[str]:
    is_on, options = cluster["enableInTreeAutoscaling"].is_set, cluster["autoscalerOptions"]
    head, *workers = groups_of(cluster)
    switch = _variables(head).get("RAY_enable_autoscaler_v2")
    if is_on and options["version"].is_set and switch:
        yield switch.problem("and autoscalerOptions.version say the same; use the latter")
    if not is_on and switch and switch["value"].text in ("1", "true"):
        yield switch.problem("needs enableInTreeAutoscaling: true")
    if is_on and options["version"].text != "v1":
        for group in (head, *workers):
            yield from _must_not_restart(group, "the autoscaler of version v2")
    for group in workers:
        yield from _replicas(group.node)
        if is_on and group.node["suspend"].is_set:
            yield group.node["suspend"].problem("excludes enableInTreeAutoscaling")
        for name in ("idleTimeoutSeconds", "priority"):
            if group.node[name].is_set and not (is_on and options["version"].text != "v1"):
                yield group.node[name].problem("needs enableInTreeAutoscaling: true and the autoscaler of version v2")


def _replicas(group: Node) -> Iterator[str]:
    """Those that are not set have defaults, which contradict nothing."""
    fewest, most, wanted = (group[name].number for name in ("minReplicas", "maxReplicas", "replicas"))
    for name in ("minReplicas", "maxReplicas", "replicas"):
        if (group[name].number or 0) < 0:
            yield group[name].problem(f"{group[name].number} is below 0")
    if fewest is not None and most is not None and fewest > most:
        yield group["minReplicas"].problem(f"{fewest} is above maxReplicas {most}")
    elif wanted is not None and not (fewest or 0) <= wanted <= (wanted if most is None else most):
        yield group["replicas"].problem(f"{wanted} is not between minReplicas {fewest} and maxReplicas {most}")


def _must_not_restart(group: Group, why: str) -> Iterator[str]:
    policy = group.pod["restartPolicy"]
    if policy.text not in ("", "Never"):
        yield policy.problem(f"{policy.text} excludes {why}; use Never")


def _fault_tolerance(cluster: Node) -> Iterator[str]:
    variables, has_options = _variables(groups_of(cluster)[0]), cluster["gcsFaultToleranceOptions"].value is not None
    if "RAY_REDIS_ADDRESS" in variables:
        wanted = "gcsFaultToleranceOptions.redisAddress instead" if has_options else "gcsFaultToleranceOptions"
        yield variables["RAY_REDIS_ADDRESS"].problem(f"RAY_REDIS_ADDRESS wants {wanted}")
    if has_options and "REDIS_PASSWORD" in variables:
        yield variables["REDIS_PASSWORD"].problem("REDIS_PASSWORD wants gcsFaultToleranceOptions.redisPassword instead")


def _auth(cluster: Node) -> Iterator[str]:
    if cluster["authOptions"]["mode"].text != "token":
        return
    version = cluster["rayVersion"]
    numbers = tuple(int(part) for part in version.text.split(".")[:2] if part.isdecimal())
    if len(numbers) < 2 or numbers < _AUTH_VERSION:
        yield version.problem(f"{version.text or 'nothing'} is set, and authOptions.mode: token needs 2.52.0 or later")


def _variables(group: Group) -> dict[str, Node]:
    """Of the container that runs Ray, which is the first."""
    containers = list(group.pod["containers"].items())
    return {entry["name"].text: entry for entry in containers[0]["env"].items()} if containers else {}
