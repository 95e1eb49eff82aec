"""What an error that crossed Ray was where it happened."""

from ray.exceptions import RayTaskError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from orchestrator.errors import ClusterError, OrchestratorError


def cause_of(error: BaseException) -> OrchestratorError:
    """Our own error as it was raised in the worker; any other as a ClusterError that keeps the remote traceback."""
    if isinstance(error, WorkerGroupError):
        ours = [found for failure in error.worker_failures.values() if (found := _ours(failure))]
        return ours[0] if ours else ClusterError(_describe(error))
    if isinstance(error, ControllerError):
        return _ours(error.controller_failure) or ClusterError(
            f"Ray Train could not start the workers: {error.controller_failure}"
        )
    return _ours(error) or ClusterError(str(error))


def _ours(error: BaseException | None) -> OrchestratorError | None:
    while error is not None:
        # Ray's own wrapper is also an instance of the class that it wraps, but its text is a whole traceback.
        if isinstance(error, OrchestratorError) and not isinstance(error, RayTaskError):
            return error
        inner = getattr(error, "_base_exc", None) or (error.cause if isinstance(error, RayTaskError) else None)
        error = inner or error.__cause__
    return None


def _describe(error: WorkerGroupError) -> str:
    ranks = ", ".join(str(rank) for rank in sorted(error.worker_failures))
    first = error.worker_failures[min(error.worker_failures)]
    return f"the training process of rank {ranks} failed:\n{first}"
