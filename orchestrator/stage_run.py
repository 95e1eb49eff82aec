"""Runs one stage of the plan under its lease, from what is there to its record."""

import os
import shutil
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator import assign
from orchestrator.cluster.overseer import Overseer
from orchestrator.environment import versions
from orchestrator.errors import LeaseError, OrchestratorError
from orchestrator.lease import Lease
from orchestrator.plan.checkpoints import CHECKPOINTS_NAME
from orchestrator.plan.plan import Plan, PlannedStage
from orchestrator.plan.record import Record, commit, read_record
from orchestrator.publishing import open_ledger
from orchestrator.run_root import RunRoot
from orchestrator.schema import EvaluationStage, ExportStage, MergeStage, TrainStage, VocabularyStage
from orchestrator.stage_kinds import Devices, Run, run_evaluation, run_export, run_train, run_vocabulary
from orchestrator.stages import bodies
from orchestrator.tracking.ledger import LEDGER_NAME, Ledger, read_ledger, summarize
from orchestrator.tracking.metrics import METRICS_NAME, read_metrics


def run_stage(run: Run, plan: Plan, planned: PlannedStage, devices: Devices, lease: Lease) -> Record:
    """Runs one stage and commits it; until then its folder counts for nothing."""
    stage = planned.folder.name
    run.root.fetch_records(stage)
    if record := read_record(planned.folder):
        # Another run finished it while this one waited for the stages before.
        return record
    started = time.monotonic()
    for name in (LEDGER_NAME, METRICS_NAME):
        run.root.fetch_file(f"{stage}/{name}")
    exchange = assign.exchange_of(run.root, plan, planned)
    exchange.clear()
    run.console.stage_begins(planned)
    with open_ledger(run.root, planned.folder, lease, run.console.warn) as ledger, _ending_noted(planned.folder, ledger):
        rows = read_metrics(planned.folder / METRICS_NAME)
        step = rows[-1]["step"] if rows else 0
        ledger.write(
            "begin",
            pid=os.getpid(),
            host=socket.gethostname(),
            command=run.command,
            pipeline=run.recipe.name,
            step=step,
        )
        match planned.stage:
            case VocabularyStage():
                results = run_vocabulary(run, planned, exchange)
            case TrainStage():
                results = run_train(
                    run, plan, planned, devices, Overseer(ledger, run.console.warn, run.console.show_learning, lease.check)
                )
            case ExportStage():
                results = run_export(run, plan, planned, bodies.export_body)
            case EvaluationStage():
                results = run_evaluation(run, plan, planned, devices.size)
            case MergeStage():
                results = run_export(run, plan, planned, bodies.merge_body) | assign.passed_on(plan, planned)
        ledger.write("finish", step=results.get("steps", 0))
    lease.check()
    results = {**results, **_history(planned), "seconds": time.monotonic() - started}
    with run.root.committing(stage):
        record = _commit(run, planned, results)
        exchange.publish_record()
    remove_loose_ends(run.root, planned)
    run.console.stage_ends(planned, record)
    return record


def remove_loose_ends(root: RunRoot, planned: PlannedStage) -> None:
    """Once a stage is done, nothing goes on from its checkpoints, and what it made has a record."""
    root.remove_inside(planned.folder.name, (CHECKPOINTS_NAME, "work"))
    shutil.rmtree(planned.folder / CHECKPOINTS_NAME, ignore_errors=True)


def _commit(run: Run, planned: PlannedStage, results: dict[str, Any]) -> Record:
    shutil.rmtree(planned.folder / "work", ignore_errors=True)
    return commit(
        planned.folder,
        Record(
            stage=planned.name,
            kind=planned.stage.kind,
            fingerprint=planned.fingerprint,
            identity=planned.identity,
            parents=planned.parents,
            recipe=run.recipe.model_dump(mode="json"),
            results=results,
            environment=versions(),
        ),
    )


@contextmanager
def _ending_noted(stage_folder: Path, ledger: Ledger) -> Iterator[None]:
    """So that the next command does not take this one for killed."""
    try:
        yield
    except LeaseError:
        # The stage is somebody else's now, and its ledger, too.
        raise
    except KeyboardInterrupt:
        ledger.write("stop", reason="SIGINT", step=0)
        raise
    except OrchestratorError as error:
        if read_ledger(stage_folder / LEDGER_NAME)[-1]["event"] not in ("failure", "stop"):
            ledger.write("failure", cause="error", step=0, message=str(error))
        raise


def _history(planned: PlannedStage) -> dict[str, Any]:
    """How a stage came to its end, over all attempts."""
    events, rows = read_ledger(planned.folder / LEDGER_NAME), read_metrics(planned.folder / METRICS_NAME)
    summary = summarize(events, rows)
    found: dict[str, Any] = {"history": summary.as_dict()}
    if rows:
        found["tokens_per_second"] = rows[-1]["tokens"] / summary.useful_seconds
        found["step"] = _typical_step(rows)
        found["checkpoint_bytes"] = max((event["bytes"] for event in events if event["event"] == "checkpoint"), default=0)
    return found


def _typical_step(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over the steps; of checkpoints, which most steps have none of, the share of each."""
    names = {name for row in rows for name in row if name.endswith("seconds") or name == "flops_utilisation"}
    typical = {name: statistics.median(row.get(name, 0.0) for row in rows) for name in sorted(names)}
    return typical | {"checkpoint_seconds": sum(row.get("checkpoint_seconds", 0.0) for row in rows) / len(rows)}
