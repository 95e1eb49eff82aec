"""Writes a stage's checkpoints, and publishes them: one at a time, and a few failures do not stop the training.

Training waits until the tensors are in their file, which the system writes to the disk when it can; that they are there,
that they are hashed, committed and published it does not wait for.
"""

import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from orchestrator.checkpoint.generations import Draft, discard_after, prune
from orchestrator.checkpoint.stored import StoredCheckpoints
from orchestrator.errors import StorageError
from orchestrator.model.tensor_stream import TensorStream
from orchestrator.plan.checkpoints import CHECKPOINTS_NAME
from orchestrator.run_root import RunRoot


class CheckpointWriter:
    """Rank 0 alone has one. Leave its `with` block, or call `finish`, before anyone else writes in the folder."""

    def __init__(
        self,
        stage_folder: Path,
        fingerprint: str,
        keep: int,
        max_failures: int,
        report: Callable[[Mapping[str, Any]], None],
        root: RunRoot | None = None,
    ) -> None:
        """`keep` generations stay; `max_failures` writes in a row may fail. `report` is called from this thread and from
        the writing one, with an "event" and its "step": checkpoint ("bytes", "seconds"), checkpoint_skipped ("reason"),
        checkpoint_failed ("error") and checkpoint_cleanup_failed ("error").

        Where the store of `root` does not take one, it counts as failed, stays on the disk, and is published with the next.
        """
        self._stage_folder = stage_folder
        self._fingerprint = fingerprint
        self._keep = keep
        self._max_failures = max_failures
        self._report = report
        self._stored = StoredCheckpoints(root or RunRoot(stage_folder.parent), stage_folder)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._failures = 0
        self._last_failure = ""

    def save(
        self,
        step: int,
        tensors: TensorStream,
        state: Mapping[str, Any],
        wait: bool = False,
        spared: Collection[int] = (),
    ) -> None:
        """Reads the tensors to their end, whatever happens, and leaves the rest to the background. The generations of the
        `spared` steps stay beside the newest.

        Leaves this one out when the one before is still being written; with `wait` it waits for that one, and for this
        one too. Raises StorageError when too many before it failed, and whatever else went wrong in the background.
        """
        if not wait and self._writing and not self._writing.done():
            reason = "the one before is still being written"
            self._report({"event": "checkpoint_skipped", "step": step, "reason": reason})
            tensors.drop()
            return
        try:
            self._settle()
        except Exception:
            tensors.drop()
            raise
        started = time.perf_counter()
        draft = self._draft(step, tensors)
        self._writing = self._executor.submit(self._write, step, draft, state, started, spared)
        if wait:
            self._settle()

    def finish(self) -> None:
        """Waits for the write that is going on; raises as `save` does. Nothing can be saved afterwards."""
        self._executor.shutdown()
        self._settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.finish()
            return
        # What ends the training says more than what the disk has to add.
        self._executor.shutdown()
        try:
            self._settle()
        except Exception as other:  # noqa: BLE001 - whatever it is, it is told with the error that is on its way
            error.add_note(f"checkpoints: {other!r}")

    def _settle(self) -> None:
        """Waits for the write that is going on, and raises what came of those before."""
        if writing := self._writing:
            # Waits first: what interrupts the waiting, such as Ctrl-C, leaves it to be waited for again.
            writing.exception()
            self._writing = None
            writing.result()
        if self._failures >= self._max_failures:
            folder = self._stored.root.inside(self._stage_folder / CHECKPOINTS_NAME)
            raise StorageError(
                f"{self._stored.root.where(folder)}: {self._failures} checkpoints in a row could not be written "
                f"({self._last_failure}); make room there, or let this user write there, and run the same command again: "
                "it goes on from the newest checkpoint that is whole"
            )

    def _draft(self, step: int, tensors: TensorStream) -> Draft | OSError:
        try:
            return Draft(self._stage_folder, step, tensors)
        except OSError as error:
            return error

    def _write(
        self, step: int, draft: Draft | OSError, state: Mapping[str, Any], started: float, spared: Collection[int]
    ) -> None:
        try:
            if isinstance(draft, OSError):
                raise draft
            with self._stored.committing():
                size = draft.commit(self._fingerprint, state)
                self._stored.publish(step, self._keep)
        except (OSError, StorageError) as error:
            self._failures += 1
            self._last_failure = f"step {step}: {error}"
            self._report({"event": "checkpoint_failed", "step": step, "error": str(error)})
            return
        self._failures = 0
        seconds = time.perf_counter() - started
        self._tidy(step, spared)
        self._report({"event": "checkpoint", "step": step, "bytes": size, "seconds": seconds})

    def _tidy(self, step: int, spared: Collection[int]) -> None:
        try:
            with self._stored.removing():
                # A damaged one further on must not count among those that are kept.
                discard_after(self._stage_folder, step)
                prune(self._stage_folder, self._keep, spared)
        except (OSError, StorageError) as error:
            self._report({"event": "checkpoint_cleanup_failed", "step": step, "error": str(error)})
