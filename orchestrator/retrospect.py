"""What came of a run root: every stage below it, done or not, with its record, its history and its numbers."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.errors import RecipeError
from orchestrator.plan.record import RECORD_NAME, read_record
from orchestrator.report.story import Story
from orchestrator.run_root import RunRoot, run_root
from orchestrator.status import StageStatus, looked_at, statuses
from orchestrator.tracking.evaluations import EVALUATIONS_NAME, read_evaluations
from orchestrator.tracking.ledger import LEDGER_NAME, read_ledger
from orchestrator.tracking.metrics import METRICS_NAME, read_metrics


def stories(place: str) -> list[Story]:
    """Of a run root, in the order in which they were changed; of a stage's folder, it and what it was made from.

    RecipeError where there is neither.
    """
    folder = Path(place).expanduser()
    if (folder / RECORD_NAME).is_file() or (folder / LEDGER_NAME).is_file():
        found = _all(run_root(str(folder.parent)))
        return _with_ancestors(found, folder.resolve().name)
    found = _all(run_root(place))
    if not found:
        raise RecipeError(f"{place}: no stage was begun there; give a run root, or the folder of a stage")
    return found


def _all(root: RunRoot) -> list[Story]:
    with looked_at(root) as folder:
        return [_story(folder / status.folder, status) for status in statuses(folder)]


def _story(folder: Path, status: StageStatus) -> Story:
    record, name = read_record(folder), status.folder.rpartition("-")
    results = record.results if record else {}
    return Story(
        folder=status.folder,
        name=record.stage if record else name[0],
        kind=record.kind if record else "",
        state=status.state,
        pipeline=status.pipeline,
        fingerprint=record.fingerprint if record else name[2],
        parents=record.parents if record else {},
        identity=record.identity if record else {},
        results=results,
        environment=record.environment if record else {},
        finished=record.finished if record else 0.0,
        rows=read_metrics(folder / METRICS_NAME),
        events=read_ledger(folder / LEDGER_NAME),
        evaluations=results.get("evaluations") or read_evaluations(folder / EVALUATIONS_NAME),
    )


def _with_ancestors(found: Sequence[Story], folder: str) -> list[Story]:
    by_mark = {story.fingerprint: story for story in found}

    def made_from(story: Story) -> Iterator[str]:
        yield story.folder
        for parent in story.parents.values():
            if parent in by_mark:
                yield from made_from(by_mark[parent])

    wanted = {name for story in found if story.folder == folder for name in made_from(story)}
    return [story for story in found if story.folder in wanted]
