"""What the nodes of a cluster can ever give, and how many workers fit into that."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.schema import KubernetesCluster

Resources = Mapping[str, float]
"""Amounts by Ray's names: CPU, GPU, or a custom one."""


@dataclass(frozen=True)
class Node:
    """A machine, or a pod."""

    resources: Resources
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Capacity:
    """Of a cluster. What two nodes have left over together is of no use to a worker, so it is counted by node."""

    nodes: tuple[Node, ...]

    def total(self, resource: str) -> int:
        return int(sum(node.resources.get(resource, 0) for node in self.nodes))

    def holds(self, bundle: Resources) -> int:
        """How many workers that take `bundle` each."""
        return sum(number_that_fit(bundle, node.resources) for node in self.nodes)

    def selected(self, labels: Mapping[str, str]) -> "Capacity":
        """That of the nodes which `labels` selects."""
        return Capacity(tuple(node for node in self.nodes if is_selected(node.labels, labels)))

    def __str__(self) -> str:
        return f"{self.total('GPU')} GPUs and {self.total('CPU')} CPUs on {len(self.nodes)} nodes"


def declared_capacity(cluster: KubernetesCluster) -> Capacity:
    """What a cluster will give once all of its nodes are there."""
    resources = {"CPU": cluster.cpus_per_node, "GPU": cluster.gpus_per_node, **accelerator(cluster.accelerator_type)}
    return Capacity((Node(resources, cluster.labels),) * cluster.most_nodes)


def accelerator(kind: str | None) -> Resources:
    """As Ray keeps to an accelerator: every node that has one has a little of a resource of that name."""
    return {f"accelerator_type:{kind}": 0.001} if kind else {}


def number_that_fit(bundle: Resources, resources: Resources) -> int:
    """How many times `resources` holds `bundle`; amounts that Ray has added and taken are a hair off."""
    return min(int(resources.get(name, 0.0) / amount + 1e-6) for name, amount in bundle.items())


def is_selected(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels are what a selector of Ray's wants: `a`, `!a`, `in(a,b)` or `!in(a,b)` for each label."""
    return all(_is_wanted(labels.get(name), wanted) for name, wanted in selector.items())


def _is_wanted(value: str | None, wanted: str) -> bool:
    negated, wanted = wanted.startswith("!"), wanted.removeprefix("!")
    values = wanted[3:-1].split(",") if wanted.startswith("in(") and wanted.endswith(")") else [wanted]
    return (value in [each.strip() for each in values]) != negated
