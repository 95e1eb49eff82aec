"""The workers of a stage: placed on the cluster together, replaced when lost, fewer or more when the cluster changes."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.cluster.nodes import answers, leaving_nodes, room
from orchestrator.cluster.sizing import Size
from orchestrator.cluster.worker import Worker
from orchestrator.errors import ClusterError

_LOOK_SECONDS = 0.5
_SETTLE_SECONDS = 3.0
"""What a lost node had is still counted as free for a moment, and what our own workers held as taken."""
_GROW_SECONDS = 10.0
"""A group is not asked to grow sooner: a restart must be worth it."""
_ANSWER_SECONDS = 5.0
"""A worker that does not say who it is for so long is lost, and its node with it."""
_CONCURRENCY = 4
"""Calls that a worker answers at once: one waits for news while others ask it to stop or to say where it stands."""


@dataclass(frozen=True)
class Member:
    """One worker and where it is."""

    actor: Any
    node: str
    """Ray's id of the node."""
    address: str
    gpus: tuple[str, ...]


class WorkerGroup:
    """Holds workers from one attempt to the next, so that a restart waits for nothing that is still there."""

    def __init__(
        self, size: Size, preloaded: Sequence[str], say: Callable[[str], None], wait_seconds: float, shared: str = ""
    ) -> None:
        """`shared` names a forkserver where all workers will be on this machine."""
        self._size, self._preloaded, self._say, self._wait_seconds = size, preloaded, say, wait_seconds
        self._shared = shared
        self._group: PlacementGroup | None = None
        self._members: list[Member | None] = []
        self._placed_at = self._closed_at = -math.inf
        self._starting: dict[int, tuple[Any, ray.ObjectRef]] = {}
        """Workers on their way, by their place in the group, and what they will say of themselves."""

    def members(self, should_stop: Callable[[], bool]) -> list[Member] | None:
        """Workers that are all there, ordered so that those of one node are neighbours; None when asked to stop.

        Raises ClusterError when there were not enough nodes for `wait_seconds`.
        """
        self._forget_lost()
        if self._must_move() or (self._group and not self._wait(self._repaired, should_stop, give_up=self._cannot_repair)):
            self.close()
        if self._group is None and not self._wait(self._placed, should_stop):
            return None
        return sorted((member for member in self._members if member), key=lambda member: member.node)

    def can_grow(self) -> bool:
        """Whether the cluster has room for more workers than there are."""
        if len(self._members) == self._size.allowed[-1] or time.monotonic() - self._placed_at < _GROW_SECONDS:
            return False
        return self._fitting() > len(self._members)

    def leaving(self) -> dict[str, float]:
        """Those of our nodes that are about to leave, and in how many seconds."""
        ours = {member.node for member in self._members if member}
        return {node: seconds for node, seconds in leaving_nodes().items() if node in ours}

    def close(self) -> None:
        for actor in [member.actor for member in self._members if member] + [actor for actor, _ in self._starting.values()]:
            ray.kill(actor)
        if self._group:
            remove_placement_group(self._group)
        self._group, self._members, self._starting = None, [], {}
        self._closed_at = time.monotonic()

    def _must_move(self) -> bool:
        return self._group is not None and (bool(self.leaving()) or self.can_grow())

    def _fitting(self) -> int:
        """The most workers that there is room for, of the numbers allowed; 0 where not even the fewest fit."""
        # What is reserved for workers that are still on their way is ours, too.
        own = Counter(placement_group_table(self._group)["bundles_to_node_id"].values()) if self._group else {}
        places = room(self._size.bundle, self._size.labels, own)
        return max((number for number in self._size.allowed if number <= places), default=0)

    def _wait(
        self,
        is_done: Callable[[], bool],
        should_stop: Callable[[], bool],
        give_up: Callable[[float], bool] = lambda _: False,
    ) -> bool:
        started, said = time.monotonic(), False
        while not is_done():
            waited = time.monotonic() - started
            if should_stop() or give_up(waited):
                return False
            if waited > self._wait_seconds:
                raise ClusterError(
                    f"the cluster had no room for {self._size.allowed[0]} workers of {self._size.bundle} "
                    f"for {self._wait_seconds / 60:.0f} minutes; add nodes, or give a range such as workers=1-4"
                )
            if waited > 2 * _SETTLE_SECONDS and not said:
                what = "room for" if self._group is None else "the start of"
                self._say(f"  waiting for {what} {self._size.allowed[0]} workers of {self._size.bundle}")
                said = True
            time.sleep(_LOOK_SECONDS)
        return True

    def _placed(self) -> bool:
        """Tries to place as many workers as fit now."""
        number = self._fitting()
        is_settled = number == self._size.allowed[-1] or time.monotonic() - self._closed_at > _SETTLE_SECONDS
        if self._group is None and number and is_settled:
            self._placed_at = time.monotonic()
            self._group = placement_group(
                [self._size.bundle] * number,
                strategy=self._size.placement.upper(),
                bundle_label_selector=[dict(self._size.labels)] * number if self._size.labels else None,
            )
            self._members = [None] * number
        if self._group and not self._repaired():
            # Room that another program took meanwhile.
            if self._is_too_large():
                self.close()
            return False
        return self._group is not None

    def _repaired(self) -> bool:
        """Whether every place has a worker, after another look at those that are on their way."""
        assert self._group
        if not self._group.wait(_LOOK_SECONDS):
            return False
        for index, member in enumerate(self._members):
            if member is None and index not in self._starting:
                actor = self._start(index)
                self._starting[index] = (actor, actor.introduction.remote())
        if not self._starting:
            return True
        refs = [ref for _, ref in self._starting.values()]
        arrived, _ = ray.wait(refs, num_returns=len(refs), timeout=_LOOK_SECONDS)
        for index, (actor, ref) in list(self._starting.items()):
            if ref in arrived:
                del self._starting[index]
                self._members[index] = _introduced(actor, ref)
        return None not in self._members

    def _cannot_repair(self, waited: float) -> bool:
        """Whether to place anew, with fewer workers: nothing is left for those that are lost, and fewer are allowed."""
        return waited > _SETTLE_SECONDS and self._is_too_large()

    def _is_too_large(self) -> bool:
        """Whether there is room, but for fewer workers."""
        return 0 < self._fitting() < len(self._members)

    def _start(self, index: int) -> Any:
        assert self._group
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        options = {
            "num_cpus": self._size.cpus,
            "num_gpus": self._size.gpus,
            "max_concurrency": _CONCURRENCY,
            "max_restarts": 0,
            "scheduling_strategy": strategy,
        }
        return ray.remote(Worker).options(**options).remote(list(self._preloaded), self._shared)

    def _forget_lost(self) -> None:
        gone = {node for node in {member.node for member in self._members if member} if not answers(node)}
        self._members = [None if member and member.node in gone else member for member in self._members]
        asked = {index: member.actor.introduction.remote() for index, member in enumerate(self._members) if member}
        if asked:
            ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER_SECONDS)
        for index, ref in asked.items():
            member = self._members[index]
            assert member
            self._members[index] = _introduced(member.actor, ref)


def _introduced(actor: Any, ref: ray.ObjectRef) -> Member | None:
    """The worker as it describes itself; None for one that is lost. ClusterError when it cannot start at all."""
    try:
        node, address, gpus = ray.get(ref, timeout=0)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        if isinstance(error, ray.exceptions.ActorDiedError) and error.actor_init_failed:
            # Where this code is not installed, for one; another would end the same way.
            raise ClusterError(f"a worker could not start: {error}") from error
        ray.kill(actor)
        return None
    return Member(actor, node, address, gpus)
