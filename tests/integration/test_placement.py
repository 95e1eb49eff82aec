"""Workers on a simulated cluster of several nodes: where they go, who is next to whom, and a head that has no devices."""

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from orchestrator.cluster.attempt import places
from orchestrator.cluster.capacity import Capacity, Node
from orchestrator.cluster.group import Member, WorkerGroup
from orchestrator.cluster.nodes import room
from orchestrator.cluster.sizing import Size, workers_for
from orchestrator.errors import ClusterError, RecipeError
from orchestrator.schema import AddressCluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(120)]

NODES: dict[str, dict[str, Any]] = {
    "127.0.0.2": {"labels": {"pool": "old"}, "resources": {"fast_disk": 2}},
    "127.0.0.3": {"labels": {"pool": "new"}},
    "127.0.0.4": {"labels": {"pool": "new"}},
}
"""By address; each has four CPUs and two devices."""
CAPACITY = Capacity(
    tuple(Node({"CPU": 4, "GPU": 2, **node.get("resources", {})}, node["labels"]) for node in NODES.values())
)
Place = Callable[..., list[Member]]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="place-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        before = os.environ.get("RAY_TMPDIR")
        os.environ["RAY_TMPDIR"] = folder
        # Only now, when the settings that it reads at its import are made.
        import ray  # noqa: PLC0415
        from ray.cluster_utils import Cluster  # noqa: PLC0415

        head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False}
        found = Cluster(initialize_head=True, head_node_args=head, connect=True)
        try:
            for address, more in NODES.items():
                found.add_node(num_cpus=4, num_gpus=2, node_ip_address=address, **more)
            yield
        finally:
            ray.shutdown()
            found.shutdown()
            os.environ.pop("RAY_TMPDIR")
            if before is not None:
                os.environ["RAY_TMPDIR"] = before


@pytest.fixture
def place() -> Iterator[Place]:
    groups: list[WorkerGroup] = []

    def placed(number: int, **cluster: Any) -> list[Member]:
        settings = AddressCluster(kind="address", address="auto", **cluster)
        size = workers_for(number, CAPACITY, settings, {})
        groups.append(WorkerGroup(size, ("json",), print, wait_seconds=6))
        members = groups[-1].members(lambda: False)
        assert members is not None
        return members

    yield placed
    for group in groups:
        group.close()
    wait_until_all_is_free()


def wait_until_all_is_free() -> None:
    """What was given back is counted as taken for a moment, and best efforts go by what is counted."""
    until = time.monotonic() + 30
    while room({"CPU": 1, "GPU": 1}, {}, {}) < 6:
        assert time.monotonic() < until
        time.sleep(0.1)


def nodes_of(members: list[Member]) -> list[str]:
    return [member.address for member in members]


def test_packed_workers_take_as_few_nodes_as_hold_them(place: Place) -> None:
    assert len(set(nodes_of(place(2)))) == 1


def test_spread_workers_take_as_many_as_there_are(place: Place) -> None:
    assert set(nodes_of(place(3, placement="spread"))) == set(NODES)


def test_ranks_of_one_node_are_neighbours_and_numbered_there(place: Place) -> None:
    members = place(6)
    found = places(members)
    assert [each.rank for each in found] == list(range(6))
    assert [each.local_rank for each in found] == [0, 1] * 3
    assert [each.node_rank for each in found] == [0, 0, 1, 1, 2, 2]
    assert {each.local_workers for each in found} == {2}
    assert Counter(each.node for each in found) == Counter(dict.fromkeys(NODES, 2))
    for first, second in zip(members[::2], members[1::2], strict=True):
        assert {*first.gpus, *second.gpus} == {"0", "1"}


def test_the_head_has_no_rank(place: Place) -> None:
    assert set(nodes_of(place(6))) == set(NODES)


@pytest.mark.parametrize(
    ("labels", "allowed"),
    [
        ({"pool": "old"}, ["127.0.0.2"]),
        ({"pool": "!old"}, ["127.0.0.3", "127.0.0.4"]),
        ({"pool": "in(old,older)"}, ["127.0.0.2"]),
    ],
    ids=str,
)
def test_labels_say_which_nodes(place: Place, labels: dict[str, str], allowed: list[str]) -> None:
    number = 2 * len(allowed)
    assert set(nodes_of(place(number, labels=labels))) == set(allowed)


def test_custom_resources_say_so_too(place: Place) -> None:
    assert nodes_of(place(2, resources={"fast_disk": 1})) == ["127.0.0.2", "127.0.0.2"]


def test_what_no_node_has_is_refused_at_once(place: Place) -> None:
    with pytest.raises(RecipeError, match=r"workers: 1 of .*accelerator_type:H100.* are more than this cluster can give: 0"):
        place(1, accelerator_type="H100")
    with pytest.raises(RecipeError, match=r"2 \(2 GPUs and 4 CPUs on 1 nodes labelled {'pool': 'old'}\)"):
        place(3, labels={"pool": "old"})


def test_what_others_use_is_waited_for_and_named(place: Place) -> None:
    place(5)
    with pytest.raises(ClusterError, match=r"no room for 2 workers of {'CPU': 1, 'GPU': 1}"):
        place(2)


def test_a_group_with_labels_counts_only_their_nodes_as_room(place: Place) -> None:
    size = Size((2, 4, 6), gpus=1, cpus=1, labels={"pool": "new"})
    group = WorkerGroup(size, ("json",), print, wait_seconds=20)
    try:
        members = group.members(lambda: False)
        assert members is not None
        assert Counter(nodes_of(members)) == {"127.0.0.3": 2, "127.0.0.4": 2}
    finally:
        group.close()
        wait_until_all_is_free()
