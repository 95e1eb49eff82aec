"""What a stage is called in wandb, and what is told about it there."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunDescription:
    """A later attempt of the same stage has the same id."""

    id: str
    """What is not a letter, digit, _ or - becomes -."""
    name: str
    group: str
    job_type: str
    tags: tuple[str, ...]
    """Each of 1 to 64 characters."""
    config: Mapping[str, Any]
    """JSON values of the typed recipe, in which no credential has a place."""
    folder: Path
    """wandb writes below `folder`/wandb."""
