"""A small Kubernetes API server: enough for kubectl and the official client to create, read, change and delete objects.

It keeps objects in memory, and serves KubeRay's own definition of a RayJob, against which it validates as strictly as it is
asked to. There is no operator behind it; tests write what one would write with `set_status`, or run emulator.py.
"""

import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from orchestrator.rayjob.crd import read_schema, schema_problems, with_defaults
from tests.kubernetes.kinds import KINDS, Kind, discovery

CONTEXT = "small"
NAMESPACE = "orchestrator"
"""Where tests keep their objects, as a user does by default."""


_PATH = re.compile(
    r"(?P<prefix>/api/v1|/apis/[^/]+/[^/]+)(/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<plural>[a-z]+)(/(?P<name>[^/]+))?(/(?P<sub>log|status))?"
)

Key = tuple[str, str, str]
"""Plural, namespace, name."""


@dataclass
class ApiServer:
    """What the server holds, for tests to look at and to change."""

    schema: Mapping[str, Any]
    objects: dict[Key, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, list[str]] = field(default_factory=dict)
    """By pod. A follower gets lines until the pod has ended."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path with its query, in order."""
    refusing: Callable[[str, str], "Refused | None"] = lambda method, path: None
    """Asked of every request, by method and path."""
    cut_after: int | None = None
    """The next follower of a log loses the connection after so many lines."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    url: str = ""

    def kubeconfig(self, path: Path) -> Path:
        """Written for kubectl and the client."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": CONTEXT,
            "contexts": [{"name": CONTEXT, "context": {"cluster": CONTEXT, "user": CONTEXT, "namespace": "default"}}],
            "clusters": [{"name": CONTEXT, "cluster": {"server": self.url}}],
            "users": [{"name": CONTEXT, "user": {}}],
        }
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    def of_kind(self, plural: str) -> list[dict[str, Any]]:
        with self.lock:
            return [each for (found, _, _), each in self.objects.items() if found == plural]

    def add_namespace(self, name: str = NAMESPACE) -> None:
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        self.objects["namespaces", "", name] = _created(namespace, "")

    def set_status(self, name: str, namespace: str = NAMESPACE, **fields: Any) -> None:
        """As the operator does."""
        with self.lock:
            job = self.objects["rayjobs", namespace, name]
            job["status"] = {**job.get("status", {}), **fields}
            _touch(job)

    def add_pod(self, name: str, labels: Mapping[str, str], phase: str = "Running", namespace: str = NAMESPACE) -> None:
        with self.lock:
            pod: dict[str, Any] = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "labels": dict(labels)},
                "spec": {"containers": [{"name": "ray-job-submitter", "image": "none"}]},
                "status": {"phase": phase},
            }
            self.objects["pods", namespace, name] = _created(pod, namespace)
            self.logs.setdefault(name, [])

    def end_pod(self, name: str, phase: str = "Succeeded", namespace: str = NAMESPACE) -> None:
        with self.lock:
            self.objects["pods", namespace, name]["status"]["phase"] = phase


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = {
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code, "message": message,
        }  # fmt: skip


@contextmanager
def api_server(crd: Path) -> Iterator[ApiServer]:
    """On a free port of this machine, for the length of a `with`."""
    state = ApiServer(read_schema(crd))
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: ApiServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_PUT(self) -> None:
        self._answer(self._put)

    def do_PATCH(self) -> None:
        self._answer(self._patch)

    def do_DELETE(self) -> None:
        self._answer(self._delete)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def _answer(self, act: Any) -> None:
        split = urlsplit(self.path)
        self._url, self._query = split.path.rstrip("/"), {key: values[-1] for key, values in parse_qs(split.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        self._body = self.rfile.read(length)
        self.state.requests.append((self.command, self.path))
        try:
            if refused := self.state.refusing(self.command, self.path):
                raise refused
            answer = act()
        except Refused as refused:
            self._send(refused.status["code"], refused.status)
        else:
            if answer is not None:
                self._send(201 if self.command == "POST" else 200, answer)

    def _send(self, code: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(ConnectionError):
            self.wfile.write(body)

    def _get(self) -> Any:
        if (found := discovery(self._url)) is not None:
            return found
        kind, namespace, name, sub = self._place()
        if sub == "log":
            self._send_log(namespace, str(name))
            return None
        with self.state.lock:
            if name:
                return self._existing(kind, namespace, name)
            wanted = dict(part.split("=", 1) for part in self._query.get("labelSelector", "").split(",") if "=" in part)
            items = [
                each
                for (plural, inside, _), each in self.state.objects.items()
                if plural == kind.plural
                and (not namespace or inside == namespace)
                and wanted.items() <= each["metadata"].get("labels", {}).items()
            ]
        return {
            "kind": f"{kind.name}List",
            "apiVersion": kind.api_version,
            "metadata": {"resourceVersion": "1"},
            "items": items,
        }

    def _post(self) -> Any:
        kind, namespace, _, _ = self._place()
        content = self._content()
        if content.get("kind") != kind.name:
            raise Refused(400, "BadRequest", f"a {kind.name} was expected")
        return self._store(kind, namespace, content, must_be_new=True)

    def _put(self) -> Any:
        kind, namespace, _, _ = self._place()
        return self._store(kind, namespace, self._content(), must_be_new=False)

    def _patch(self) -> Any:
        kind, namespace, name, _ = self._place()
        with self.state.lock:
            content = self._content()
            if "apply-patch" in self.headers.get("Content-Type", ""):
                return self._store(kind, namespace, content, must_be_new=False)
            merged = _merged(self._existing(kind, namespace, str(name)), content)
            return self._store(kind, namespace, merged, must_be_new=False)

    def _delete(self) -> Any:
        kind, namespace, name, _ = self._place()
        with self.state.lock:
            found = self._existing(kind, namespace, str(name))
            if "dryRun" not in self._query:
                del self.state.objects[kind.plural, namespace, str(name)]
        return found

    def _content(self) -> dict[str, Any]:
        if "protobuf" in self.headers.get("Content-Type", ""):
            raise Refused(415, "UnsupportedMediaType", "only JSON and YAML are understood here")
        return yaml.safe_load(self._body)

    def _place(self) -> tuple[Kind, str, str | None, str | None]:
        if match := _PATH.fullmatch(self._url):
            for kind in KINDS:
                if (kind.prefix, kind.plural) == (match["prefix"], match["plural"]):
                    return kind, match["namespace"] or "", match["name"], match["sub"]
        raise Refused(404, "NotFound", f"the server could not find the requested resource {self._url}")

    def _existing(self, kind: Kind, namespace: str, name: str) -> dict[str, Any]:
        try:
            return self.state.objects[kind.plural, namespace, name]
        except KeyError:
            raise Refused(404, "NotFound", f'{kind.plural}.{kind.group} "{name}" not found') from None

    def _store(self, kind: Kind, namespace: str, content: dict[str, Any], must_be_new: bool) -> dict[str, Any]:
        name = content["metadata"]["name"]
        if kind.name == "RayJob":
            self._validate(content)
            content = with_defaults(content, self.state.schema)
        with self.state.lock:
            key = (kind.plural, namespace, name)
            if namespace and ("namespaces", "", namespace) not in self.state.objects:
                raise Refused(404, "NotFound", f'namespaces "{namespace}" not found')
            if must_be_new and key in self.state.objects:
                raise Refused(409, "AlreadyExists", f'{kind.plural}.{kind.group} "{name}" already exists')
            stored = _created(content, namespace) if key not in self.state.objects else _touch(content)
            if "dryRun" not in self._query:
                self.state.objects[key] = stored
            return stored

    def _validate(self, content: Mapping[str, Any]) -> None:
        known = {key: value for key, value in content.items() if key != "status"}
        problems = schema_problems(known, self.state.schema)
        unknown = [problem for problem in problems if ": no such field" in problem]
        if unknown and self._query.get("fieldValidation") == "Strict":
            fields = ", ".join(f'unknown field "{problem.partition(":")[0]}"' for problem in unknown)
            raise Refused(400, "BadRequest", f"strict decoding error: {fields}")
        if invalid := [problem for problem in problems if problem not in unknown]:
            name = content["metadata"].get("name")
            raise Refused(422, "Invalid", f'RayJob.ray.io "{name}" is invalid: {"; ".join(invalid)}')

    def _send_log(self, namespace: str, pod: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        sent, follows = 0, self._query.get("follow", "").lower() == "true"
        with suppress(ConnectionError):
            while True:
                with self.state.lock:
                    lines = self.state.logs.get(pod, [])[sent:]
                    found = self.state.objects.get(("pods", namespace, pod))
                    is_over = not follows or found is None or found["status"]["phase"] in ("Succeeded", "Failed")
                for line in lines:
                    if follows and self.state.cut_after == 0:
                        self.state.cut_after = None
                        self.close_connection = True
                        return
                    self._chunk(line.encode() + b"\n")
                    if follows and self.state.cut_after:
                        self.state.cut_after -= 1
                sent += len(lines)
                if is_over:
                    break
                time.sleep(0.05)
            self._chunk(b"")

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")


def _created(content: dict[str, Any], namespace: str) -> dict[str, Any]:
    metadata = {
        **content["metadata"],
        **({"namespace": namespace} if namespace else {}),
        "uid": str(uuid.uuid4()),
        "creationTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return _touch({**content, "metadata": metadata})


def _touch(content: dict[str, Any]) -> dict[str, Any]:
    content["metadata"]["resourceVersion"] = str(time.monotonic_ns())
    return content


def _merged(old: Any, patch: Any) -> Any:
    """A JSON merge patch (RFC 7386)."""
    if not isinstance(old, Mapping) or not isinstance(patch, Mapping):
        return patch
    merged = {**old, **{name: _merged(old.get(name), value) for name, value in patch.items()}}
    return {name: value for name, value in merged.items() if value is not None}
