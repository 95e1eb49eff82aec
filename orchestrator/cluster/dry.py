"""A dry step by the workers of a group: one attempt, of which nothing stays."""

import shutil

from orchestrator.cluster.attempt import Ended, Watch, Work, run_attempt
from orchestrator.cluster.group import WorkerGroup
from orchestrator.schema import Recovery
from orchestrator.stages import bodies
from orchestrator.stages.assignment import DryStep, TrainAssignment


def dry_step(assignment: TrainAssignment, group: WorkerGroup, recovery: Recovery) -> DryStep | str:
    """What it took, or what went wrong."""
    members = group.members(lambda: False)
    assert members, "nobody asked to stop"
    logs = assignment.folder.parent / f".preflight-{assignment.folder.name}"
    work = Work(bodies.dry_body, assignment, logs)
    try:
        outcome = run_attempt(work, members, Watch(recovery.hang_seconds, lambda: None, lambda event: None))
    finally:
        shutil.rmtree(logs, ignore_errors=True)
    if isinstance(outcome, Ended):
        return outcome.result
    remedy = "; lower resources.micro_batch_size, or set resources.gradient_checkpointing=true"
    return f"{outcome}{remedy if outcome.cause == 'out_of_memory' else ''}"
