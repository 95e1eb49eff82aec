"""Workers on a Ray of four CPUs: as many as may be, whatever else there is room for; the same ones as long as they live."""

import tempfile
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from orchestrator.cluster.group import WorkerGroup
from orchestrator.cluster.sizing import Size
from orchestrator.errors import ClusterError

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(120)]

MakeGroup = Callable[..., WorkerGroup]


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[ModuleType]:
    # Only now, when the settings that it reads at its import are made.
    import ray  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="group-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        yield ray
        ray.shutdown()


@pytest.fixture
def make_group() -> Iterator[MakeGroup]:
    groups = []

    def make(allowed: tuple[int, ...], preloaded: tuple[str, ...] = ("json",), wait_seconds: float = 60) -> WorkerGroup:
        groups.append(WorkerGroup(Size(allowed, gpus=0, cpus=1), preloaded, print, wait_seconds))
        return groups[-1]

    yield make
    for group in groups:
        group.close()


def never() -> bool:
    return False


def test_room_that_is_left_for_fewer_does_not_unsettle_those_that_there_are(make_group: MakeGroup) -> None:
    group = make_group((1, 2, 3))
    members = group.members(never)
    assert members is not None
    assert len(members) == 3
    assert group.members(never) == members


def test_a_lost_worker_is_replaced_and_the_others_stay(ray: ModuleType, make_group: MakeGroup) -> None:
    group = make_group((2, 3))
    before = group.members(never)
    assert before is not None
    ray.kill(before[1].actor)
    after = group.members(never)
    assert after is not None
    assert len(after) == 3
    stayed = {member.actor for member in before} & {member.actor for member in after}
    assert stayed == {before[0].actor, before[2].actor}


def test_a_group_that_never_fits_says_so_when_it_was_waited_for_long_enough(make_group: MakeGroup) -> None:
    with pytest.raises(ClusterError, match=r"no room for 5 workers of \{'CPU': 1\}"):
        make_group((5,), wait_seconds=1).members(never)


def test_a_worker_that_cannot_start_ends_the_wait(make_group: MakeGroup) -> None:
    # No process can have such an argument.
    with pytest.raises(ClusterError, match=r"a worker could not start: (.|\n)*embedded null byte"):
        make_group((1,), preloaded=("\0",)).members(never)


def test_who_is_asked_to_stop_waits_for_nobody(make_group: MakeGroup) -> None:
    assert make_group((5,)).members(lambda: True) is None
