"""Reading a manifest that may be wrong in any way: what is not there, or of another kind, is empty."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Node:
    """A place in a manifest: what stands there, and its path for messages."""

    value: Any
    path: str = ""

    def __getitem__(self, name: str) -> "Node":
        inner = self.value.get(name) if isinstance(self.value, Mapping) else None
        return Node(inner, f"{self.path}.{name}" if self.path else name)

    def items(self) -> Iterator["Node"]:
        """Of a list."""
        if isinstance(self.value, list | tuple):
            yield from (Node(each, f"{self.path}[{index}]") for index, each in enumerate(self.value))

    def entries(self) -> dict[str, "Node"]:
        """Of a mapping."""
        return {name: self[name] for name in self.value} if isinstance(self.value, Mapping) else {}

    @property
    def is_set(self) -> bool:
        """As Go sees it: an empty text, list or mapping is not set, and neither are 0 and false."""
        return bool(self.value)

    @property
    def number(self) -> int | None:
        return self.value if isinstance(self.value, int) and not isinstance(self.value, bool) else None

    @property
    def text(self) -> str:
        return self.value if isinstance(self.value, str) else ""

    def problem(self, message: str) -> str:
        return f"{self.path}: {message}"


@dataclass(frozen=True)
class Group:
    """The head, or the workers of one group."""

    name: str
    node: Node

    @property
    def pod(self) -> Node:
        return self.node["template"]["spec"]


def groups_of(cluster: Node) -> list[Group]:
    """Head first."""
    workers = [Group(f"group {group['groupName'].text!r}", group) for group in cluster["workerGroupSpecs"].items()]
    return [Group("the head", cluster["headGroupSpec"]), *workers]


def pods_of(spec: Node) -> list[Node]:
    """Every pod's spec in a job: head, workers, submitter."""
    pods = [group.pod for group in groups_of(spec["rayClusterSpec"])]
    submitter = spec["submitterPodTemplate"]
    return [*pods, submitter["spec"]] if submitter.is_set else pods
