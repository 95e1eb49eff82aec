"""Where a stage goes on: what a checkpoint says beside the engine's tensors, and how every rank learns of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from orchestrator.checkpoint.files import DamagedCheckpoint, read_files
from orchestrator.checkpoint.generations import discard_after, newest_good
from orchestrator.checkpoint.stored import StoredCheckpoints
from orchestrator.engine import Engine, EngineState
from orchestrator.errors import StorageError, TrainingError
from orchestrator.plan.checkpoints import checkpoint_folder
from orchestrator.stages.assignment import TrainAssignment
from orchestrator.train.checks import LearningState
from orchestrator.train.link import Link
from orchestrator.train.loop import Progress


@dataclass(frozen=True)
class Resumed:
    """The stage as it was when a checkpoint was taken."""

    progress: Progress
    state: EngineState | None
    """On rank 0 only, which hands it to the others parameter by parameter."""
    held_out: dict[str, dict[str, float]]
    """Measured before the stage learned anything."""
    learning: LearningState
    evaluations: list[dict[str, Any]]
    """Measured since."""


def describe(
    progress: Progress,
    numbers: Mapping[str, int | float],
    held_out: Mapping[str, Mapping[str, float]],
    learning: LearningState,
    evaluations: Sequence[Mapping[str, Any]],
) -> Mapping[str, Any]:
    """All that a checkpoint says beside its tensors, as JSON values; `numbers` are the engine's."""
    return {
        "progress": asdict(progress),
        "numbers": numbers,
        "held_out": held_out,
        "learning": asdict(learning),
        "evaluations": list(evaluations),
    }


def resume(assignment: TrainAssignment, link: Link, rank: int) -> Resumed | None:
    """The newest good checkpoint, None when there is none; all ranks must call.

    Rank 0 alone reads it, so that all ranks agree even where their views of the storage differ for a moment.
    """
    tensors, description = _read(assignment, link) if rank == 0 else (None, None)
    box = [description]
    dist.broadcast_object_list(box, src=0)
    description = box[0]
    if description is None:
        return None
    state = EngineState(tensors, description["numbers"]) if tensors is not None else None
    progress = Progress(**description["progress"])
    learning = LearningState(**description["learning"])
    return Resumed(progress, state, description["held_out"], learning, description.get("evaluations", []))


def return_to_best(assignment: TrainAssignment, link: Link, engine: Engine, steps: Sequence[int], now: int) -> int:
    """Takes the engine to the first of these steps whose state is there, and gives it; all ranks must call.

    `now` is the step that the engine is at. Raises TrainingError where none of the others is whole.
    """
    found, state = _first_whole(assignment, link, steps, now) if dist.get_rank() == 0 else (None, None)
    box = [found]
    dist.broadcast_object_list(box, src=0)
    (step,) = box
    if step is None:
        raise TrainingError(f"{assignment.folder}: the best state cannot be read again, of step {steps[0]}; train it again")
    if step != now:
        engine.load_state(state)
    return step


def _first_whole(
    assignment: TrainAssignment, link: Link, steps: Sequence[int], now: int
) -> tuple[int | None, EngineState | None]:
    stored = StoredCheckpoints(assignment.exchange.root, assignment.folder)
    for step in steps:
        if step == now:
            return step, None
        try:
            stored.fetch(step)
            found = read_files(checkpoint_folder(assignment.folder, step), step, assignment.origin.fingerprint)
        except (DamagedCheckpoint, OSError) as error:
            link.note({"event": "damaged", "what": f"step {step}, the best so far: {error}"})
            continue
        return step, EngineState(found.tensors, found.state["numbers"])
    return None, None


def _read(assignment: TrainAssignment, link: Link) -> tuple[dict[str, Any] | None, Mapping[str, Any] | None]:
    stored = StoredCheckpoints(assignment.exchange.root, assignment.folder)
    stored.mirror()
    found, damaged = newest_good(assignment.folder, assignment.origin.fingerprint, stored.fetch)
    for what in damaged:
        link.note({"event": "damaged", "what": what})
    step = found.step if found else 0
    try:
        with stored.removing():
            discard_after(assignment.folder, step)
    except StorageError as error:
        # What is left there is found damaged again, should another have to go on before it is written anew.
        link.note({"event": "checkpoint_cleanup_failed", "step": step, "error": str(error)})
    if found is None:
        return None, None
    link.note({"event": "resumed", "step": found.step})
    return found.tensors, found.state
