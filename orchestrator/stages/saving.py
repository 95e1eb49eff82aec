"""What a training stage leaves: an adapter or, where every weight learned, a model."""

from pathlib import Path

from orchestrator.checkpoint.adapter import write_adapter
from orchestrator.checkpoint.manifest import Origin
from orchestrator.checkpoint.whole_model import write_whole_model
from orchestrator.engine import Engine
from orchestrator.model.adapters import adapter_parameters, written_tensors
from orchestrator.model.loss import SummedLoss
from orchestrator.model.subspace import NAME as SUBSPACE
from orchestrator.model.subspace import SubspaceModule
from orchestrator.stages.assignment import TrainAssignment

_PREFIX = "model."
"""Before every parameter's name: of the model inside its loss."""


def save_learned(assignment: TrainAssignment, origin: Origin, engine: Engine, model: SummedLoss, rank: int) -> None:
    """All ranks gather, rank 0 writes."""
    if assignment.adaptation.full:
        _save_whole(assignment, origin, engine, getattr(model.model, SUBSPACE, None), rank)
        return
    names = [_PREFIX + name for name in adapter_parameters(model.model, assignment.adaptation)]
    parameters = {name.removeprefix(_PREFIX): tensor for name, tensor in engine.parameters(names) if rank == 0}
    if rank == 0:
        tensors = written_tensors(model.model, parameters, assignment.adaptation, assignment.base_tokens)
        folder: Path = assignment.folder / "adapter"
        write_adapter(folder, tensors, assignment.adaptation, origin, assignment.base, assignment.tokenizer)


def _save_whole(
    assignment: TrainAssignment, origin: Origin, engine: Engine, subspace: SubspaceModule | None, rank: int
) -> None:
    """A model is written as it is gathered, a file at a time."""
    layout = {name: shape for name, shape in engine.layout().items() if not name.startswith(f"{_PREFIX}{SUBSPACE}.")}
    coming = ((name.removeprefix(_PREFIX), tensor) for name, tensor in engine.parameters(list(layout)))
    if subspace:
        coming = ((name, tensor.detach()) for name, tensor in subspace.moved(coming))
    if rank > 0:
        # Gathered all the same.
        for _ in coming:
            pass
        return
    named = {name.removeprefix(_PREFIX): tensor for name, tensor in layout.items()}
    beside = (assignment.base, assignment.tokenizer)
    write_whole_model(assignment.folder / "model", named, coming, origin, beside)
