"""A training stage's checkpoints on disk: each stands whole or not at all, wherever its writer dies.

    checkpoints/step-00000040/            committed
    checkpoints/.step-00000040.partial    being written
    checkpoints/.step-00000040.replaced   stood there when the step was written anew; counts until the new one does
    checkpoints/.step-00000040.removed    being deleted

One process writes, prunes and discards at a time; any may read.
"""

import errno
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.files import Checkpoint, DamagedCheckpoint, read_files, write_files, write_tensors
from orchestrator.errors import StorageError
from orchestrator.model.tensor_stream import TensorStream
from orchestrator.plan.checkpoints import (
    CHECKPOINTS_NAME,
    checkpoint_folder,
    checkpoint_steps,
    replaced_folder,
    step_folders,
)
from orchestrator.store import sync_folder


class Draft:
    """A generation that has its tensors and is not committed yet; nobody else may write in the stage until it is.

    Whatever was committed before stays so, whether it is committed or not.
    """

    def __init__(self, stage_folder: Path, step: int, tensors: TensorStream) -> None:
        """Reads the stream to its end. Raises OSError when the disk does not take it."""
        self._stage_folder, self._step = stage_folder, step
        self._final = checkpoint_folder(stage_folder, step)
        self._partial = self._final.with_name(f".{self._final.name}.partial")
        with self._removed_if_it_fails():
            try:
                _make_folder(stage_folder)
                # Not left for the end: what a killed process left may be what fills the disk.
                _remove_leftovers(stage_folder)
                self._partial.mkdir()
                write_tensors(self._partial, tensors)
            except OSError:
                # What the disk does not take must not keep the other ranks waiting for the parts that are left.
                tensors.drop()
                raise

    def commit(self, fingerprint: str, state: Mapping[str, Any]) -> int:
        """Puts it in the place of one of the same step; returns the size of tensors and `state`, which is JSON, in bytes.

        Raises OSError when the disk does not take it.
        """
        with self._removed_if_it_fails():
            size = write_files(self._partial, fingerprint, self._step, state)
            _put_in_place(self._partial, self._final, replaced_folder(self._stage_folder, self._step))
        return size

    @contextmanager
    def _removed_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise


def prune(stage_folder: Path, keep: int, spared: Collection[int] = ()) -> None:
    """Removes all but the newest `keep` committed generations and those of the `spared` steps, and whatever a process that
    died left half done."""
    assert keep > 0, "a prune that keeps nothing would lose the run"
    _remove_leftovers(stage_folder)
    committed = checkpoint_steps(stage_folder)
    for step, folder in step_folders(stage_folder).items():
        # A folder without a manifest was never a checkpoint of ours, or is none any more.
        if step not in (*committed[-keep:], *spared):
            _remove(folder)


def discard_after(stage_folder: Path, step: int) -> None:
    """Removes the generations newer than `step`: that is where training goes on from, so they will not be reached again."""
    _remove_leftovers(stage_folder)
    for found, folder in step_folders(stage_folder).items():
        if found > step:
            _remove(folder)


def newest_good(
    stage_folder: Path, fingerprint: str, fetch: Callable[[int], None] | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """The newest generation of this stage whose every byte is what was written, and what is wrong with newer ones.

    `fetch` brings the files of a step's generation here, or raises DamagedCheckpoint where there are none to bring. Raises
    StorageError when one cannot be asked: that it is damaged is not known then.
    """
    damages = []
    for step, folder in reversed(step_folders(stage_folder).items()):
        try:
            if fetch:
                fetch(step)
            return read_files(folder, step, fingerprint), damages
        except DamagedCheckpoint as damage:
            damages.append(f"step {step}: {damage}")
        except OSError as error:
            if error.errno != errno.EIO:
                raise StorageError(f"{folder} cannot be read ({error}); see to it and run the same command again") from error
            damages.append(f"step {step}: the disk has lost a part of it ({error})")
    return None, damages


def _make_folder(stage_folder: Path) -> None:
    folder = stage_folder / CHECKPOINTS_NAME
    if not folder.is_dir():
        folder.mkdir(parents=True)
        sync_folder(stage_folder)


def _put_in_place(partial: Path, final: Path, replaced: Path) -> None:
    """The commit. Between the two renames the one that is replaced counts still, under its other name."""
    with suppress(FileNotFoundError):
        final.rename(replaced)
    partial.rename(final)
    sync_folder(final.parent)


def _remove_leftovers(stage_folder: Path) -> None:
    """Gives a replaced generation whose successor never came its name back, and removes every other hidden folder."""
    for step, folder in step_folders(stage_folder).items():
        if folder == replaced_folder(stage_folder, step):
            folder.rename(checkpoint_folder(stage_folder, step))
    # Ours alone: a network file system keeps hidden files of its own for what is deleted while open.
    for path in sorted((stage_folder / CHECKPOINTS_NAME).glob(".step-*")):
        _remove(path)


def _remove(path: Path) -> None:
    """Deletes a generation so that no half of one can be taken for a whole."""
    removed = path.with_name(f".{path.name.strip('.').partition('.')[0]}.removed")
    if path != removed:
        _delete(removed)
        path.rename(removed)
        sync_folder(path.parent)
    _delete(removed)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
