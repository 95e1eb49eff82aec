"""Which checkpoints a training stage has: read from names alone, so that a plan can say from which step a stage goes on.

<stage folder>/checkpoints/step-00000040/              committed: it has its name and its manifest
<stage folder>/checkpoints/.step-00000040.replaced     stood there when the step was written anew
"""

import re
from pathlib import Path

CHECKPOINTS_NAME = "checkpoints"
MANIFEST_NAME = "manifest.json"
_STEP = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})|\.step-([0-9]{8}|[1-9][0-9]{8,})\.replaced")


def checkpoint_folder(stage_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands once it is committed."""
    return stage_folder / CHECKPOINTS_NAME / f"step-{step:08d}"


def replaced_folder(stage_folder: Path, step: int) -> Path:
    """Where a checkpoint is put while another of the same step takes its place."""
    return stage_folder / CHECKPOINTS_NAME / f".step-{step:08d}.replaced"


def step_folders(stage_folder: Path) -> dict[int, Path]:
    """The folder of each step that has one, ascending, whatever is in it."""
    folder = stage_folder / CHECKPOINTS_NAME
    matches = [_STEP.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    steps = sorted({int(match[1] or match[2]) for match in matches if match})
    final = {step: checkpoint_folder(stage_folder, step) for step in steps}
    # A process that died between its two renames left the one before under this name, and nothing under the right one.
    return {step: path if path.exists() else replaced_folder(stage_folder, step) for step, path in final.items()}


def checkpoint_steps(stage_folder: Path) -> list[int]:
    """The steps with a committed checkpoint, ascending; none of them is verified."""
    return [step for step, folder in step_folders(stage_folder).items() if (folder / MANIFEST_NAME).is_file()]
