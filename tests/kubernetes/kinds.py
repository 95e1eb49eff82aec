"""The kinds of object that the small API server knows, and what it tells kubectl of them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A kind of object that the server knows."""

    group: str
    version: str
    plural: str
    name: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def prefix(self) -> str:
        return f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"


KINDS = (
    Kind("", "v1", "namespaces", "Namespace", namespaced=False),
    Kind("", "v1", "pods", "Pod"),
    Kind("", "v1", "secrets", "Secret"),
    Kind("", "v1", "configmaps", "ConfigMap"),
    Kind("", "v1", "serviceaccounts", "ServiceAccount"),
    Kind("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim"),
    Kind("ray.io", "v1", "rayjobs", "RayJob"),
    Kind("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy"),
    Kind("rbac.authorization.k8s.io", "v1", "roles", "Role"),
    Kind("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding"),
    Kind("kueue.x-k8s.io", "v1beta1", "localqueues", "LocalQueue"),
    Kind("kueue.x-k8s.io", "v1beta1", "clusterqueues", "ClusterQueue", namespaced=False),
    Kind("kueue.x-k8s.io", "v1beta1", "resourceflavors", "ResourceFlavor", namespaced=False),
)


def discovery(path: str) -> dict[str, Any] | None:
    """What kubectl asks before anything else; None for a path that is none of that."""
    groups = sorted({(kind.group, kind.version) for kind in KINDS if kind.group})
    match path:
        case "/version":
            return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
        case "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        case "/apis":
            entries = [
                {"name": group, "versions": [entry], "preferredVersion": entry}
                for group, version in groups
                for entry in [{"groupVersion": f"{group}/{version}", "version": version}]
            ]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": entries}
        case "/openapi/v3":
            prefixes = sorted({kind.prefix for kind in KINDS})
            return {"paths": {prefix[1:]: {"serverRelativeURL": f"/openapi/v3{prefix}"} for prefix in prefixes}}
    if kinds := [kind for kind in KINDS if kind.prefix == path]:
        head = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": kinds[0].api_version}
        return {**head, "resources": [_resource(kind) for kind in kinds]}
    if path.startswith("/openapi/v3"):
        return _open_api([kind for kind in KINDS if kind.prefix == path.removeprefix("/openapi/v3")])
    return None


def _resource(kind: Kind) -> dict[str, Any]:
    verbs = ["create", "delete", "get", "list", "patch", "update"]
    return {
        "name": kind.plural,
        "singularName": kind.name.lower(),
        "namespaced": kind.namespaced,
        "kind": kind.name,
        "verbs": verbs,
    }


def _open_api(kinds: list[Kind]) -> dict[str, Any]:
    """Says of each kind no more than that the server checks fields itself, so that kubectl leaves it to it."""
    parameters = [{"name": name, "in": "query", "schema": {"type": "string"}} for name in ("dryRun", "fieldValidation")]
    paths = {}
    for kind in kinds:
        inside = "/namespaces/{namespace}" if kind.namespaced else ""
        identity = {"group": kind.group, "version": kind.version, "kind": kind.name}
        operation = {"parameters": parameters, "x-kubernetes-group-version-kind": identity, "responses": {}}
        paths[f"{kind.prefix}{inside}/{kind.plural}"] = {"post": operation}
        paths[f"{kind.prefix}{inside}/{kind.plural}/{{name}}"] = {"patch": operation, "put": operation}
    schemas = {
        f"{kind.group or 'core'}.{kind.version}.{kind.name}": {
            "type": "object",
            "x-kubernetes-preserve-unknown-fields": True,
            "x-kubernetes-group-version-kind": [{"group": kind.group, "version": kind.version, "kind": kind.name}],
        }
        for kind in kinds
    }
    return {
        "openapi": "3.0.0",
        "info": {"title": "small", "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas},
    }
