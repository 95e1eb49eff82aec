"""The API server, asked for RayJobs and for what their pods print. Every error becomes a ClusterError with its remedy."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import kubernetes.client
import kubernetes.config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from orchestrator.errors import ClusterError, RecipeError
from orchestrator.rayjob.names import MANAGED_BY, PREFIX
from orchestrator.rayjob.templates import SUBMITTER_CONTAINER
from orchestrator.schema import KubernetesCluster

_GROUP, _VERSION, _PLURAL = "ray.io", "v1", "rayjobs"
_SECONDS = 30
_QUIET_SECONDS = 3600
"""A log that says nothing for so long is asked for again."""


class AlreadyThere(Exception):
    """A RayJob of that name exists."""


class RayJobs:
    """Those of one namespace."""

    def __init__(self, cluster: KubernetesCluster) -> None:
        self._namespace = cluster.namespace
        client = _client(cluster.context)
        # Its methods give what was asked for, or a promise of it where that was asked for; the types know no difference.
        self._objects: Any = kubernetes.client.CustomObjectsApi(client)
        self._pods: Any = kubernetes.client.CoreV1Api(client)
        self._where = {"group": _GROUP, "version": _VERSION, "namespace": self._namespace, "plural": _PLURAL}

    def create(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Asks the API server what it thinks of it, strictly, before anything is made; AlreadyThere for a second one."""
        with self._told("create"):
            try:
                for dry in ({"dry_run": "All"}, {}):
                    made = self._objects.create_namespaced_custom_object(
                        **self._where, body=dict(manifest), field_validation="Strict", _request_timeout=_SECONDS, **dry
                    )
                return made
            except ApiException as error:
                if error.status == 409:
                    raise AlreadyThere from error
                raise

    def named(self, name: str) -> dict[str, Any] | None:
        with self._told("get"):
            try:
                return self._objects.get_namespaced_custom_object(**self._where, name=name, _request_timeout=_SECONDS)
            except ApiException as error:
                if error.status == 404:
                    return None
                raise

    def ours(self, fingerprint: str | None = None) -> list[dict[str, Any]]:
        """All that this project has handed in, or those of one pipeline, oldest first."""
        labels = {**MANAGED_BY, **({f"{PREFIX}fingerprint": fingerprint} if fingerprint else {})}
        selector = ",".join(f"{name}={value}" for name, value in labels.items())
        with self._told("list"):
            found = self._objects.list_namespaced_custom_object(
                **self._where, label_selector=selector, _request_timeout=_SECONDS
            )
        return sorted(found["items"], key=lambda job: job["metadata"].get("creationTimestamp", ""))

    def delete(self, name: str) -> None:
        """The job and all its pods, each of which gets its grace period."""
        with self._told("delete"):
            self._objects.delete_namespaced_custom_object(
                **self._where, name=name, propagation_policy="Foreground", _request_timeout=_SECONDS
            )

    def submitters(self, name: str) -> dict[str, bool]:
        """The pods that have handed in a job's entrypoint and have begun to print, oldest first; whether each still runs."""
        with self._told("list the pods of"):
            pods = self._pods.list_namespaced_pod(
                self._namespace, label_selector=f"job-name={name}", _request_timeout=_SECONDS
            ).items
        begun = [pod for pod in pods if pod.status and pod.status.phase in ("Running", "Succeeded", "Failed")]
        begun.sort(key=lambda pod: str(pod.metadata.creation_timestamp))
        return {pod.metadata.name: pod.status.phase == "Running" for pod in begun}

    def log(self, pod: str, follow: bool) -> Iterator[str]:
        """What the command prints, by line; with `follow` until it ends."""
        with self._told("read the log of"):
            response = self._pods.read_namespaced_pod_log(
                pod,
                self._namespace,
                container=SUBMITTER_CONTAINER,
                follow=follow,
                _preload_content=False,
                _request_timeout=(_SECONDS, _QUIET_SECONDS),
            )
            rest = b""
            for chunk in response.stream():
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (line.decode("utf-8", errors="replace") for line in lines)
            if rest:
                yield rest.decode("utf-8", errors="replace")

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except ApiException as error:
            raise _explained(error, f"{what} RayJobs in namespace {self._namespace}") from error
        except HTTPError as error:
            raise ClusterError(f"cluster: the API server does not answer ({error})") from error


def _client(context: str | None) -> Any:
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ and context is None:
            # In a pod, whose service account may hand jobs in.
            kubernetes.config.load_incluster_config()
        else:
            kubernetes.config.load_kube_config(context=context)
    except kubernetes.config.ConfigException as error:
        raise RecipeError(
            f"cluster.context: no cluster is configured here ({error}); name a context of your kubeconfig, or write the "
            "manifest with action=render and apply it where there is one"
        ) from error
    return kubernetes.client.ApiClient()


def _explained(error: ApiException, what: str) -> ClusterError | RecipeError:
    message = _message(error)
    match error.status:
        case 404 if "namespaces" in message:
            return ClusterError(f"cluster.namespace: {message}; kubectl apply -k k8s/base makes it")
        case 404 if '"' in message:
            return ClusterError(f"cluster: {message}; it is gone, or was never there")
        case 404:
            return ClusterError(f"cluster: the API server knows no RayJobs ({message}); install KubeRay 1.7 or later there")
        case 401 | 403:
            return ClusterError(f"cluster: you may not {what} ({message}); ask for a role with these verbs")
        case 400 | 422:
            return RecipeError(f"cluster: the API server refuses the RayJob: {message}")
        case _:
            return ClusterError(f"cluster: the API server failed to {what} ({error.status} {message})")


def _message(error: ApiException) -> str:
    try:
        return str(json.loads(error.body or "")["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)
