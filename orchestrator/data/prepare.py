"""Tokenizes data once, part by part. The result is a folder named by all that it depends on, and whole or absent.

Parts are made in parallel and joined in their order as they come, so that the same bytes come out whoever makes them. What
is made and joined stays when the process is killed, and the next one goes on from there.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock

from orchestrator.data.duplicates import find_firsts
from orchestrator.data.joining import Joining, Progress, read_progress
from orchestrator.data.part import PartMaker, Preparation, firsts_file, marks_file, read_counts
from orchestrator.data.slices import Part
from orchestrator.data.summary import Summary, read_summary, write_summary
from orchestrator.errors import DataError, OrchestratorError, RecipeError
from orchestrator.store import sha256_value, sync_files, sync_folder

MIN_BLOCK_LENGTH = 8
"""Below this, the parts that a row keeps of a prompt and an answer would be no tokens at all."""

IDLE_CPUS = 0.1
"""Cores that a process asks for which prepares data with a crew: some, so that it does not end on a node that has none."""

Task = Callable[[PartMaker, Part], object]
Crew = Callable[[Task, Preparation, Path, Sequence[Part]], Iterable[object]]
"""Does a task for each part, in whatever order and processes, and yields once for each that is done."""


def in_this_process(task: Task, preparation: Preparation, workshop: Path, parts: Sequence[Part]) -> Iterator[object]:
    """One part after another; a fast tokenizer uses all cores for each."""
    maker = PartMaker(preparation, workshop)
    for part in parts:
        yield task(maker, part)


def prepared_key(preparation: Preparation) -> str:
    """12 hex over all that the rows depend on; where the files lie is no part of it."""
    return sha256_value(preparation.identity())[:12]


def find_prepared(preparation: Preparation, run_root: Path) -> tuple[Path, int] | None:
    """The complete folder and its number of rows, None when it has yet to be made."""
    folder = _folder(preparation, run_root)
    summary = read_summary(folder)
    return (folder, summary.rows) if summary else None


def preparation_progress(preparation: Preparation, run_root: Path) -> Progress | None:
    """How far a preparation is that some process works on; None where none has begun."""
    return read_progress(_workshop(preparation, run_root))


def prepare(preparation: Preparation, run_root: Path, crew: Crew = in_this_process) -> Path:
    """The folder `<run_root>/data-<key>`, made now or found complete; a second process waits for the first.

    Raises DataError, ModelError, or RecipeError for a tiny block.
    """
    if preparation.block_length < MIN_BLOCK_LENGTH:
        raise RecipeError(f"block_length {preparation.block_length} is too short; give at least {MIN_BLOCK_LENGTH} tokens")
    folder = _folder(preparation, run_root)
    if read_summary(folder):
        return folder
    run_root.mkdir(parents=True, exist_ok=True)
    workshop = _workshop(preparation, run_root)
    # The kernel takes the lock from a process that is killed.
    with FileLock(f"{workshop}.lock"):
        if not read_summary(folder):
            try:
                _prepare(preparation, workshop, folder, crew)
            except OrchestratorError:
                # It is the data's fault, and whoever mends that prepares other data.
                shutil.rmtree(workshop)
                raise
    Path(f"{workshop}.lock").unlink(missing_ok=True)
    return folder


def _prepare(preparation: Preparation, workshop: Path, folder: Path, crew: Crew) -> None:
    workshop.mkdir(exist_ok=True)
    parts = preparation.parts()
    if preparation.choice.deduplicate:
        _mark_copies(preparation, workshop, parts, crew)
    with Joining(workshop, parts) as joining:
        left = [part for part in parts[joining.joined :] if not read_counts(workshop, part)]
        joining.join_what_is_there()
        for _ in crew(PartMaker.make, preparation, workshop, left):
            joining.join_what_is_there()
        summary = joining.summary(preparation)
    _check(preparation, joining.read, summary)
    rows = joining.folder
    write_summary(rows, summary, preparation.identity())
    sync_files(rows)
    if folder.exists():
        # Half a folder: nothing here leaves one, but an interrupted copy does.
        shutil.rmtree(folder)
    rows.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(workshop)


def _mark_copies(preparation: Preparation, workshop: Path, parts: Sequence[Part], crew: Crew) -> None:
    """Reads everything once, before anything is tokenized."""
    if all(firsts_file(workshop, piece).is_file() for part in parts for piece in part.slices):
        return
    seen: set[str] = set()
    new = [part for part in parts if _is_new(part, seen)]
    left = [part for part in new if not all(marks_file(workshop, piece).is_file() for piece in part.slices)]
    for _ in crew(PartMaker.mark, preparation, workshop, left):
        pass
    find_firsts(workshop, parts)


def _is_new(part: Part, seen: set[str]) -> bool:
    """Whether it holds slices that no earlier one does; a weight above 1 repeats them."""
    names = {piece.name for piece in part.slices}
    new = bool(names - seen)
    seen |= names
    return new


def _check(preparation: Preparation, read: dict[str, int], summary: Summary) -> None:
    """DataError where a file holds nothing, or all together."""
    for place, file in enumerate(preparation.files):
        if not read[str(place)]:
            raise preparation.nothing_in(file)
    if not summary.rows:
        raise DataError(f"{preparation.field}: nothing to learn in {len(preparation.files)} files; they hold no tokens")


def _folder(preparation: Preparation, run_root: Path) -> Path:
    return run_root / f"data-{prepared_key(preparation)}"


def _workshop(preparation: Preparation, run_root: Path) -> Path:
    """Where parts are made and joined until all is whole."""
    return run_root / f".data-{prepared_key(preparation)}"
