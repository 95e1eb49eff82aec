"""A training stage, whatever happens to its workers: attempt after attempt, until it is done or another would not help."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from orchestrator.cluster.attempt import Ended, Watch, Work, run_attempt
from orchestrator.cluster.failures import Failure
from orchestrator.cluster.forkserver_client import PRELOADED
from orchestrator.cluster.group import Member, WorkerGroup
from orchestrator.cluster.interrupts import Interrupts, listening
from orchestrator.cluster.overseer import Overseer
from orchestrator.cluster.sizing import Size
from orchestrator.errors import ClusterError, Interrupted, TrainingError
from orchestrator.schema import Recovery
from orchestrator.stages import bodies
from orchestrator.stages.assignment import TrainAssignment


def worker_group(size: Size, recovery: Recovery, say: Callable[[str], None], shared: str) -> WorkerGroup:
    """Workers for training stages; they start with the first one, and serve the next as they are."""
    return WorkerGroup(size, PRELOADED, say, recovery.wait_minutes * 60, shared)


def train_with_recovery(assignment: TrainAssignment, group: WorkerGroup, recovery: Recovery, overseer: Overseer) -> None:
    """Runs a training stage to its end, and leaves the workers of the group idle.

    Raises the error that no further attempt would mend, ClusterError when the failures in a row are too many, and
    Interrupted after Ctrl-C or SIGTERM, with everything saved.
    """
    with listening() as interrupts:
        _Attempts(assignment, group, recovery, overseer, interrupts).run()


class _Attempts:
    def __init__(
        self, assignment: TrainAssignment, group: WorkerGroup, recovery: Recovery, overseer: Overseer, interrupts: Interrupts
    ) -> None:
        self._assignment, self._group, self._recovery = assignment, group, recovery
        self._overseer, self._interrupts = overseer, interrupts
        self._saved_step = 0
        self._has_shown = False
        """What learns, which a person is told once."""
        self._failures: list[Failure] = []
        """In a row, without a new checkpoint between them."""

    def run(self) -> None:
        while True:
            members = self._group.members(self._interrupts.is_asked)
            if members is None:
                self._stop("before it started")
            outcome = self._attempt(members)
            if isinstance(outcome, Failure):
                self._survive(outcome)
            elif outcome.result.completed:
                return
            else:
                self._left_early(outcome)

    def _attempt(self, members: list[Member]) -> Ended | Failure:
        assignment = self._assignment
        micro, workers = assignment.micro_batch_size, len(members)
        self._overseer.ledger.write(
            "attempt",
            workers=workers,
            steps=assignment.num_steps,
            zero=assignment.zero,
            micro_batch_size=micro,
            accumulation=assignment.stage.global_batch_size // (micro * workers),
            nodes=sorted({member.address for member in members}),
        )
        work = Work(bodies.train_body, assignment, assignment.folder / "logs")
        watch = Watch(self._recovery.hang_seconds, self._stop_reason, self._note)
        return run_attempt(work, members, watch)

    def _stop_reason(self) -> str | None:
        self._overseer.check()
        if self._interrupts.signal is not None:
            return self._interrupts.signal.name
        if self._group.leaving():
            return "preemption"
        return "resize" if self._group.can_grow() else None

    def _note(self, event: Mapping[str, Any]) -> None:
        fields = dict(event)
        kind = fields.pop("event")
        self._overseer.ledger.write(kind, **fields)
        match kind:
            case "learns":
                if not self._has_shown:
                    self._overseer.show_learning(event["kinds"])
                self._has_shown = True
            case "checkpoint":
                self._saved_step = event["step"]
                self._failures = []
            case "resumed":
                self._saved_step = event["step"]
            case "checkpoint_failed":
                self._overseer.say(f"  the checkpoint of step {event['step']} failed: {event['error']}; training goes on")
            case "damaged":
                self._overseer.say(f"  {event['what']}; going on from the one before")

    def _left_early(self, ended: Ended) -> None:
        """The ranks saved and left because they were asked to: by a person, or because the cluster changes."""
        step, saved = ended.result.step, self._saved_step
        if self._interrupts.signal is not None:
            # A step whose numbers went wrong is not saved, and the disk may have been full.
            which = "which is saved" if saved == step else f"the newest checkpoint is of step {saved}"
            self._stop(f"at step {step} of {self._assignment.num_steps}, {which}")
        cause = ended.reason or "preemption"
        self._overseer.ledger.write("failure", cause=cause, step=step, message="the ranks saved and left")
        what = "there is room for more workers" if cause == "resize" else "a node is about to leave"
        self._overseer.say(f"  {what}: going on from step {saved} on the nodes that stay")

    def _stop(self, where: str) -> NoReturn:
        signal = self._interrupts.signal
        assert signal is not None
        self._overseer.ledger.write("stop", reason=signal.name, step=self._saved_step)
        raise Interrupted(f"stopped by {signal.name} {where}; the same command goes on from there", signal)

    def _survive(self, failure: Failure) -> None:
        """Writes a failure down, and raises when another attempt would not help."""
        self._overseer.ledger.write(
            "failure", cause=failure.cause, rank=failure.rank, node=failure.node, step=failure.step, message=failure.message
        )
        if failure.error:
            raise failure.error
        if self._interrupts.signal is not None:
            self._stop(f"while {failure}; the newest checkpoint is of step {self._saved_step}")
        if failure.cause == "out_of_memory":
            self._assignment = self._with_smaller_batch(failure)
            self._overseer.say(f"  {failure}; going on with micro-batches of {self._assignment.micro_batch_size}")
            return
        self._check_repetition(failure)
        self._failures.append(failure)
        if len(self._failures) > self._recovery.max_failures:
            raise ClusterError(
                f"{failure}\n{failure.detail}\nThat was failure {len(self._failures)} in a row without a new checkpoint, "
                f"and recovery.max_failures is {self._recovery.max_failures}; the same command tries again"
            )
        self._overseer.say(f"  {failure}; starting again from the newest checkpoint{_shown(failure.detail)}")

    def _with_smaller_batch(self, failure: Failure) -> TrainAssignment:
        smaller = smaller_micro_batch(self._assignment.micro_batch_size)
        if not smaller:
            raise TrainingError(
                f"{failure}\nOut of memory with micro-batches of 1; use resources.gradient_checkpointing=true, a higher "
                "zero=, a shorter block_length, or devices with more memory"
            )
        return replace(self._assignment, micro_batch_size=smaller)

    def _check_repetition(self, failure: Failure) -> None:
        """An error of the program itself that comes again at the same step will come every time."""
        before = self._failures[-1] if self._failures else None
        if failure.cause == "error" and before and (before.message, before.step) == (failure.message, failure.step):
            raise ClusterError(f"{failure}, twice at the same step\n{failure.detail}")


def smaller_micro_batch(size: int) -> int:
    """The next smaller size that makes up the same global batch, at most half; 0 where there is none."""
    return next((divisor for divisor in range(size // 2, 0, -1) if size % divisor == 0), 0)


def _shown(detail: str) -> str:
    return f"\n{detail.rstrip()}" if detail else ""
