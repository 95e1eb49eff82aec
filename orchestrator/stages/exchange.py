"""What a stage gets from the object store on the machine that runs it, and how what it made comes back to the command.

Files are written on the machine that makes them. With an object store each machine has a mirror of its own, so they are
published there, and the command fetches them before it commits the stage. Where the run root is a folder that all machines
see, nothing of this is done.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from orchestrator.plan.record import RECORD_NAME, WORK_NAMES, artifact_files
from orchestrator.run_root import RunRoot
from orchestrator.store import sha256_file, write_json

DATA_NAME = "data.json"
"""Commits a folder of prepared data."""
_MADE_NAME = "work/made.json"
"""Commits what a stage made until its record does."""


@dataclass(frozen=True)
class Exchange:
    """Of one stage. Its methods raise StorageError when the store does not do what it is asked."""

    root: RunRoot
    stage: str
    """The name of its folder."""
    needed: tuple[tuple[str, str], ...]
    """Folders below the root that it is made from, each with the file that commits it."""

    @classmethod
    def of(cls, root: RunRoot, stage: str, parents: Iterable[str]) -> Self:
        """`stage` and `parents` are names of folders."""
        return cls(root, stage, tuple((parent, RECORD_NAME) for parent in parents))

    def with_data(self, folders: Iterable[Path]) -> Self:
        """Prepared data is needed, too."""
        return replace(self, needed=(*self.needed, *((self.root.inside(folder), DATA_NAME) for folder in folders)))

    def bring(self) -> None:
        """Fetches what is needed and not here."""
        for folder, commit_name in self.needed:
            self.root.fetch(folder, commit_name)

    def hand_over(self) -> None:
        """Publishes what was made on this machine: the artifact, and what lies in `work/`."""
        if self.root.url is None:
            return
        folder = self.root.local / self.stage
        work = [path for path in (folder / "work").iterdir() if path != folder / _MADE_NAME]
        files = artifact_files(folder) | {f"work/{path.name}": sha256_file(path) for path in work}
        write_json(folder / _MADE_NAME, {"files": files})
        self.root.publish(self.stage, _MADE_NAME)

    def collect(self) -> None:
        """Brings what was handed over, from whichever machine, to this one."""
        self.root.fetch(self.stage, _MADE_NAME)

    def publish_record(self) -> None:
        """From then on the stage is done: what its record lists was handed over before."""
        self.root.publish(self.stage, RECORD_NAME, after=_MADE_NAME)

    def clear(self) -> None:
        """Removes what an unfinished attempt left of its artifact here; its checkpoints, numbers and history stay."""
        folder = self.root.local / self.stage
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.name == "work" or (path.name not in WORK_NAMES and path.is_dir()):
                shutil.rmtree(path)
            elif path.name not in WORK_NAMES and not path.name.startswith("."):
                path.unlink()
        (folder / "work").mkdir()
