"""A stage's checkpoints in the object store of its run root: the generations that stand on disk, each whole or not at all.

Where the run root is a folder, all of this does nothing.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint.files import DamagedCheckpoint
from orchestrator.checkpoint.generations import prune
from orchestrator.plan.checkpoints import MANIFEST_NAME, checkpoint_folder, checkpoint_steps, step_folders
from orchestrator.remote import NotWhole
from orchestrator.run_root import RunRoot
from orchestrator.tracking.evaluations import EVALUATIONS_NAME
from orchestrator.tracking.metrics import METRICS_NAME


@dataclass(frozen=True)
class StoredCheckpoints:
    """One process has them at a time. Its methods raise StorageError when the store does not do what it is asked."""

    root: RunRoot
    stage_folder: Path
    """In the mirror."""

    def mirror(self) -> None:
        """Makes the stage's generations on disk those of the store, where one is written before it counts.

        Brings their manifests alone, and the metrics of the steps before them; `fetch` brings the rest.
        """
        if self.root.url is None:
            return
        self.root.fetch_records(self._stage)
        self.root.fetch_file(f"{self._stage}/{METRICS_NAME}")
        # What has lost its manifest was never published. It would pass for damaged.
        prune(self.stage_folder, keep=max(1, len(checkpoint_steps(self.stage_folder))))

    def fetch(self, step: int) -> None:
        """Brings a generation; DamagedCheckpoint when the store no longer has what was published."""
        try:
            self.root.fetch(self._generation(step), MANIFEST_NAME)
        except NotWhole as error:
            raise DamagedCheckpoint(str(error)) from error

    def committing(self) -> AbstractContextManager[object]:
        """Held from before a generation is committed on disk until it is published."""
        return self.root.committing(self._stage)

    def publish(self, step: int, keep: int) -> None:
        """Publishes the generation of a step, and those of the `keep` newest that could not be before."""
        if self.root.url is None:
            return
        # First, so that whoever goes on from the generation elsewhere has the numbers of all steps before it.
        for name in (METRICS_NAME, EVALUATIONS_NAME):
            if (self.stage_folder / name).is_file():
                self.root.publish_file(f"{self._stage}/{name}")
        for kept in [found for found in checkpoint_steps(self.stage_folder) if found <= step][-keep:]:
            self.root.publish(self._generation(kept), MANIFEST_NAME)

    @contextmanager
    def removing(self) -> Iterator[None]:
        """The generations that disappear from the disk within the `with` are removed from the store, too."""
        before = step_folders(self.stage_folder) if self.root.url else {}
        yield
        for step in sorted(before.keys() - step_folders(self.stage_folder).keys()) if before else ():
            self.root.remove(self._generation(step), MANIFEST_NAME)

    @property
    def _stage(self) -> str:
        return self.root.inside(self.stage_folder)

    def _generation(self, step: int) -> str:
        return self.root.inside(checkpoint_folder(self.stage_folder, step))
