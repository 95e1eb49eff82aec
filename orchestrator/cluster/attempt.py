"""One attempt at a stage: a process for each rank, watched until all have finished or left, or one of them has failed."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from orchestrator.cluster.failures import Failure, explains, first_cause
from orchestrator.cluster.group import Member
from orchestrator.cluster.messages import Died, Finished, Job, Place, Raised, Report
from orchestrator.cluster.nodes import answers
from orchestrator.train.link import PHASES, Link

_REPORT_SECONDS = 0.5
_AFTERMATH_SECONDS = 5.0
"""For the failure that others follow from to arrive, too: a lost node is known later than the connections that it breaks."""
_START_SECONDS = 300.0
"""A worker's first process waits for its imports."""


@dataclass(frozen=True)
class Work:
    """What all ranks do together."""

    body: Callable[[Any, Link], Any]
    assignment: Any
    logs: Path


@dataclass(frozen=True)
class Watch:
    """What is looked at while they do."""

    hang_seconds: float
    stop_reason: Callable[[], str | None]
    """Asked several times a second; once it gives a reason, the ranks finish their step, save and leave."""
    note: Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Ended:
    """All ranks left in order."""

    result: Any
    """Of rank 0."""
    reason: str | None
    """Why they were asked to stop, if they were."""


def run_attempt(work: Work, members: Sequence[Member], watch: Watch) -> Ended | Failure:
    """Starts the ranks and returns when none of them runs any more."""
    attempt = _Attempt(work, members, watch)
    try:
        outcome = attempt.run()
    finally:
        attempt.kill()
    attempt.hear_last_words()
    return outcome


class _Attempt:
    def __init__(self, work: Work, members: Sequence[Member], watch: Watch) -> None:
        self._work, self._members, self._watch = work, members, watch
        self._places = places(members)
        self._reports: dict[int, Report] = {}
        self._asked: dict[ray.ObjectRef, int] = {}
        self._failures: list[Failure] = []
        self._reason: str | None = None

    def run(self) -> Ended | Failure:
        self._start()
        while not self._failures and not self._all_ended():
            self._hear(_REPORT_SECONDS)
            self._look_for_hang()
            self._pass_on_stop()
        if not self._failures:
            ending = self._reports[0].ending
            assert isinstance(ending, Finished)
            return Ended(ending.result, self._reason)
        until = time.monotonic() + _AFTERMATH_SECONDS
        while self._asked and time.monotonic() < until and not explains(self._failures):
            self._hear(_REPORT_SECONDS)
        return first_cause(self._failures)

    def kill(self) -> None:
        """Leaves no process behind, wherever it can still be reached."""
        killed = [member.actor.kill.remote() for member in self._members]
        ray.wait(killed, num_returns=len(killed), timeout=_REPORT_SECONDS * 10)

    def hear_last_words(self) -> None:
        """Of ranks that were killed: a checkpoint may have come to its end meanwhile."""
        until = time.monotonic() + _REPORT_SECONDS
        while self._asked and (left := until - time.monotonic()) > 0:
            ready, _ = ray.wait(list(self._asked), num_returns=1, timeout=left)
            for ref in ready:
                rank = self._asked.pop(ref)
                # A worker that is lost says nothing.
                with suppress(ray.exceptions.RayError):
                    report: Report = ray.get(ref)
                    self._take(rank, report)
                    if report.ending is None:
                        # That was told before it was killed, and there may be more.
                        self._ask(rank)

    def _start(self) -> None:
        """Rank 0 first: it opens the place where the others meet."""
        port = self._start_ranks([0], None)
        if port is not None:
            self._start_ranks(range(1, len(self._members)), (self._places[0].node, port))

    def _start_ranks(self, ranks: Sequence[int], meeting: tuple[str, int] | None) -> int | None:
        """The port of the meeting place, if one of these ranks opens it."""
        starting = {rank: self._members[rank].actor.start.remote(self._job(rank, meeting)) for rank in ranks}
        port = None
        for rank, ref in starting.items():
            try:
                port = ray.get(ref, timeout=_START_SECONDS)
            except ray.exceptions.RayError as error:
                self._failures.append(self._not_started(rank, error))
                return None
            self._ask(rank)
        return port

    def _job(self, rank: int, meeting: tuple[str, int] | None) -> Job:
        member = self._members[rank]
        neighbours = [other for other in self._members if other.node == member.node]
        gpus = [gpu for neighbour in neighbours for gpu in neighbour.gpus]
        return Job(
            body=self._work.body,
            assignment=self._work.assignment,
            place=self._places[rank],
            backend="nccl" if gpus else "gloo",
            meeting=meeting,
            log=self._work.logs / f"rank-{rank}.log",
            visible_gpus=",".join(gpus) or None,
        )

    def _ask(self, rank: int) -> None:
        self._asked[self._members[rank].actor.report.remote(_REPORT_SECONDS)] = rank

    def _hear(self, seconds: float) -> None:
        """Takes what the workers have to tell, and asks again those that go on."""
        ready, _ = ray.wait(list(self._asked), num_returns=1, timeout=seconds)
        for ref in ready:
            rank = self._asked.pop(ref)
            try:
                report: Report = ray.get(ref)
            except ray.exceptions.RayError as error:
                self._failures.append(self._lost(rank, error))
                continue
            self._take(rank, report)
            if report.ending is None:
                self._ask(rank)
            elif not isinstance(report.ending, Finished):
                self._failures.append(self._failure(rank, report.ending))

    def _take(self, rank: int, report: Report) -> None:
        self._reports[rank] = report
        for event in report.notes:
            self._watch.note(event)

    def _all_ended(self) -> bool:
        return not self._asked

    def _failure(self, rank: int, ending: Raised | Died) -> Failure:
        node = self._places[rank].node
        if isinstance(ending, Died):
            return Failure("worker_lost", rank, node, self._step(), str(ending))
        cause = "out_of_memory" if ending.kind == "out_of_memory" else "error"
        message = f"failed: {ending.message}"
        return Failure(cause, rank, node, self._step(), message, ending.traceback, ending.error, ending.at)

    def _not_started(self, rank: int, error: BaseException) -> Failure:
        if isinstance(error, ray.exceptions.RayTaskError):
            return Failure("error", rank, self._places[rank].node, 0, "could not start", str(error.cause))
        return self._lost(rank, error)

    def _lost(self, rank: int, error: BaseException) -> Failure:
        member = self._members[rank]
        if answers(member.node):
            return Failure("worker_lost", rank, member.address, self._step(), "lost its worker", str(error))
        return Failure("node_lost", rank, member.address, self._step(), "is gone with its node")

    def _look_for_hang(self) -> None:
        running = {rank: self._reports[rank] for rank in self._asked.values() if rank in self._reports}
        if self._failures or not any(report.silent_seconds > self._watch.hang_seconds for report in running.values()):
            return
        rank = hanging_rank(running)
        report, place = self._reports[rank], self._places[rank]
        how = "was stopped (SIGSTOP)" if report.stopped else f"hangs in {report.beat.phase}"
        message = f"{how} after step {report.beat.step}: no progress for {report.silent_seconds:.0f} seconds"
        self._failures.append(Failure("hang", rank, place.node, self._step(), message, self._stack(rank)))

    def _stack(self, rank: int) -> str:
        try:
            return ray.get(self._members[rank].actor.stack.remote(), timeout=_REPORT_SECONDS * 10)
        except ray.exceptions.RayError as error:
            return f"its stack could not be read: {error}"

    def _pass_on_stop(self) -> None:
        if self._reason is None and (reason := self._watch.stop_reason()):
            self._reason = reason
            for member in self._members:
                member.actor.ask_to_stop.remote()

    def _step(self) -> int:
        return max((report.beat.step for report in self._reports.values()), default=0)


def places(members: Sequence[Member]) -> list[Place]:
    """The rank of each worker; those of one node stand side by side in `members`."""
    nodes = list(dict.fromkeys(member.node for member in members))
    found: list[Place] = []
    for rank, member in enumerate(members):
        earlier = [place for place, other in zip(found, members, strict=False) if other.node == member.node]
        alike = sum(other.node == member.node for other in members)
        found.append(Place(rank, len(members), len(earlier), alike, nodes.index(member.node), member.address))
    return found


def hanging_rank(reports: Mapping[int, Report]) -> int:
    """The rank that the others wait for: one that was stopped, else the one that came least far."""

    def standing(rank: int) -> tuple[bool, int, int, int]:
        report = reports[rank]
        return not report.stopped, report.beat.step, PHASES.index(report.beat.phase), rank

    return min(reports, key=standing)
