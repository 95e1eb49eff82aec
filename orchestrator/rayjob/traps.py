"""What schema, API server and operator let through, and what goes wrong for it hours later.

A manifest of ours has none of these; one that somebody edited may.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from importlib.metadata import version
from typing import Any

from orchestrator.rayjob.reading import Group, Node, groups_of, pods_of

_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
_UNITS = {
    "m": Fraction(1, 1000),
    "": Fraction(1),
    **{unit: Fraction(1000) ** power for power, unit in enumerate("kMGTP", start=1)},
    **{f"{unit}i": Fraction(1024) ** power for power, unit in enumerate("KMGTP", start=1)},
}
_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_KEY|CREDENTIAL)", re.IGNORECASE)
_QUEUE = "kueue.x-k8s.io/queue-name"
_SHARED_MEMORY = "/dev/shm"
_SHORTEST_GRACE_SECONDS = 60
"""A step and a checkpoint take longer than the 30 seconds that Kubernetes gives by default."""


def trap_problems(manifest: dict[str, Any]) -> list[str]:
    """One line for each trap, the field first."""
    job = Node(manifest)
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    found = [*_submission(spec), *_cleanup(spec), *_queue(job), *_version(cluster), *_head(cluster)]
    for pod in pods_of(spec):
        found += [*_mounts(pod), *_devices(pod), *_security(pod), *_secrets(pod)]
    for group in groups_of(cluster):
        found += [*_shared_memory(group), *_grace(group)]
    found += _one_image(spec)
    return found


def _submission(spec: Node) -> Iterator[str]:
    mode = spec["submissionMode"]
    if mode.value is not None and mode.text not in _MODES:
        yield mode.problem(f"{mode.value!r} is none of {', '.join(_MODES)}; the operator would take it and never submit")
    if not spec["entrypoint"].text.strip() and mode.text != "InteractiveMode":
        yield spec["entrypoint"].problem("is empty; the job would do nothing")
    if "\n" in spec["entrypoint"].text.strip():
        yield spec["entrypoint"].problem("has several lines; only a single command is sure to arrive")
    if spec["jobId"].is_set and spec["backoffLimit"].is_set:
        yield spec["jobId"].problem("is the same for every try, and Ray refuses a second job of that name; leave it out")
    for name in re.findall(r"^\s*([A-Za-z_]\w*)\s*:", spec["runtimeEnvYAML"].text, flags=re.MULTILINE):
        if _SECRET.search(name):
            yield spec["runtimeEnvYAML"].problem(f"{name} would stand in Ray's dashboard; use a secretKeyRef in env")


def _cleanup(spec: Node) -> Iterator[str]:
    shutdown = spec["shutdownAfterJobFinishes"]
    if not shutdown.is_set and not spec["deletionStrategy"].is_set and not spec["clusterSelector"].is_set:
        yield shutdown.problem("is false, and no deletionRules are given: the GPUs would stay taken after the job")


def _queue(job: Node) -> Iterator[str]:
    label, spec = job["metadata"]["labels"][_QUEUE], job["spec"]
    if label.is_set and not spec["shutdownAfterJobFinishes"].is_set:
        yield spec["shutdownAfterJobFinishes"].problem("must be true for Kueue, or the quota is never given back")
    autoscaling = spec["rayClusterSpec"]["enableInTreeAutoscaling"]
    if label.is_set and autoscaling.is_set:
        yield autoscaling.problem("excludes Kueue, which admits jobs whole")
    if label.is_set and spec["clusterSelector"].is_set:
        yield spec["clusterSelector"].problem("excludes Kueue, which admits whole clusters")


def _version(cluster: Node) -> Iterator[str]:
    ray = cluster["rayVersion"]
    if cluster.is_set and not ray.text:
        yield ray.problem("is not set; the operator chooses the autoscaler and more by it")
    elif ray.text and ray.text != version("ray"):
        yield ray.problem(
            f"{ray.text} is not {version('ray')}, with which this project is tested; image and field must agree"
        )


def _head(cluster: Node) -> Iterator[str]:
    params = cluster["headGroupSpec"]["rayStartParams"]
    if cluster.is_set and params["num-cpus"].text != "0" and cluster["headGroupSpec"]["resources"]["CPU"].text != "0":
        yield params["num-cpus"].problem("is not 0: ranks would be placed on the head, and lost with it")
    for container in cluster["headGroupSpec"]["template"]["spec"]["containers"].items():
        for name, amount in container["resources"]["limits"].entries().items():
            if name.endswith("/gpu"):
                yield amount.problem("a GPU of the head trains nothing; take it out")


def _mounts(pod: Node) -> Iterator[str]:
    volumes = {volume["name"].text for volume in pod["volumes"].items()}
    for container in pod["containers"].items():
        seen: set[str] = set()
        for mount in container["volumeMounts"].items():
            if mount["name"].text not in volumes:
                yield mount["name"].problem(
                    f"{mount['name'].text} is none of the pod's volumes ({', '.join(sorted(volumes))})"
                )
            path = mount["mountPath"].text.rstrip("/")
            if path in seen:
                yield mount["mountPath"].problem(f"{path} is mounted twice")
            seen.add(path)


def _devices(pod: Node) -> Iterator[str]:
    for container in pod["containers"].items():
        requests, limits = (container["resources"][name].entries() for name in ("requests", "limits"))
        for name in sorted({*requests, *limits}):
            is_device = "/" in name
            asked, allowed = (str(side[name].value) if name in side else None for side in (requests, limits))
            if is_device and asked is not None and asked != allowed:
                where = container["resources"]["requests"][name]
                yield where.problem(
                    f"{asked} is requested and {allowed or 'nothing'} is the limit; of devices both are the same"
                )
            if not is_device and asked and allowed and (_amount(asked) or 0) > (_amount(allowed) or 0):
                yield container["resources"]["requests"][name].problem(f"{asked} is above the limit {allowed}")
        for side in (requests, limits):
            yield from (
                amount.problem(f"{amount.value!r} is no quantity; write 500m, 4 or 64Gi")
                for amount in side.values()
                if _amount(str(amount.value)) is None
            )


def _shared_memory(group: Group) -> Iterator[str]:
    containers = list(group.pod["containers"].items())
    volumes = {volume["name"].text: volume for volume in group.pod["volumes"].items()}
    for mount in containers[0]["volumeMounts"].items() if containers else ():
        if mount["mountPath"].text.rstrip("/") != _SHARED_MEMORY or mount["name"].text not in volumes:
            continue
        memory = volumes[mount["name"].text]["emptyDir"]
        if memory["medium"].text != "Memory":
            yield memory["medium"].problem(f"is not Memory, so {_SHARED_MEMORY} would be a disk")
        limit = containers[0]["resources"]["limits"]["memory"]
        size, most = _amount(str(memory["sizeLimit"].value)), _amount(str(limit.value))
        if size is not None and most is not None and size > most:
            yield memory["sizeLimit"].problem(
                f"{memory['sizeLimit'].value} is above the container's memory {limit.value}, which it is a part of"
            )


def _grace(group: Group) -> Iterator[str]:
    seconds = group.pod["terminationGracePeriodSeconds"]
    if (30 if seconds.number is None else seconds.number) < _SHORTEST_GRACE_SECONDS:
        given = "30, by default," if seconds.number is None else seconds.number
        yield seconds.problem(f"{given} is too short for a step and a checkpoint; give at least {_SHORTEST_GRACE_SECONDS}")


def _security(pod: Node) -> Iterator[str]:
    user = pod["securityContext"]["runAsUser"]
    if user.number == 0:
        yield user.problem("0 is root")
    if pod["securityContext"]["runAsNonRoot"].value is not True:
        yield pod["securityContext"]["runAsNonRoot"].problem("is not true")
    for container in pod["containers"].items():
        escalation = container["securityContext"]["allowPrivilegeEscalation"]
        if escalation.value is not False:
            yield escalation.problem("is not false")
        if container["securityContext"]["privileged"].is_set:
            yield container["securityContext"]["privileged"].problem("is true, which gives a container the whole node")


def _secrets(pod: Node) -> Iterator[str]:
    for container in pod["containers"].items():
        for entry in container["env"].items():
            if _SECRET.search(entry["name"].text) and entry["value"].is_set:
                yield entry["value"].problem(f"{entry['name'].text} stands in the manifest; use valueFrom.secretKeyRef")
            if entry["value"].is_set and entry["valueFrom"].is_set:
                yield entry["value"].problem(f"{entry['name'].text} has both value and valueFrom")


def _one_image(spec: Node) -> Iterator[str]:
    images = [pod["containers"] for pod in pods_of(spec)]
    first = next((container["image"].text for containers in images for container in containers.items()), "")
    for containers in images[1:]:
        for container in list(containers.items())[:1]:
            if container["image"].text != first:
                yield container["image"].problem(
                    f"{container['image'].text} is not the head's {first}; versions would differ"
                )


def _amount(text: str) -> Fraction | None:
    match = _QUANTITY.fullmatch(text)
    return Fraction(match[1]) * _UNITS[match[2] or ""] if match else None
