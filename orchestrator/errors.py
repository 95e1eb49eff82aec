"""The errors a person can act on, by what should happen next.

Each says where, what was given and what would be right. `launch/` prints them without a traceback.
"""

from collections.abc import Iterable


class OrchestratorError(Exception):
    """A failure whose message is meant for the user."""


class RecipeError(OrchestratorError):
    """The recipe, or a word typed on the command line, asks for something that cannot be done; never retried."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class DataError(OrchestratorError):
    """A file that the recipe names is missing, empty or malformed; never retried."""


class ModelError(OrchestratorError):
    """A base model, tokenizer or adapter is incomplete, or does not belong with the others; never retried."""


class TrainingError(OrchestratorError):
    """Training did not do what the stage declares; the message names the tensor or the number."""


class ClusterError(OrchestratorError):
    """The cluster cannot give what the recipe asks for, or workers were lost."""


class StorageError(OrchestratorError):
    """What must be kept cannot be written, or what was kept cannot be read; training stops rather than go on for nothing."""


class LeaseError(OrchestratorError):
    """Another run holds the stage."""


class Interrupted(OrchestratorError):
    """The run was asked to stop, and did so in order."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)
        self.signal_number = signal_number

    def __str__(self) -> str:
        return str(self.args[0])
