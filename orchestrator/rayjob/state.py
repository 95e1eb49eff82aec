"""How a RayJob is: what the operator has written into its status, for people and for exit codes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from orchestrator.rayjob.names import PREFIX

_ENDED = ("Complete", "Failed", "ValidationFailed")
_EXIT_CODE = re.compile(r"exit code (\d+)")


@dataclass(frozen=True)
class JobState:
    """One RayJob at one moment."""

    name: str
    pipeline: str
    stage: str
    deployment: str
    """Of the cluster and the submission: Initializing, Running, Retrying, Suspended, Complete, Failed and others."""
    job: str
    """Of the command: PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED; empty before it is handed in."""
    reason: str
    message: str
    failed_tries: int
    is_leaving: bool
    """Deleted, and gone once its pods are."""
    created: datetime | None

    @property
    def has_ended(self) -> bool:
        return self.deployment in _ENDED

    @property
    def exit_code(self) -> int:
        """The command's own, as far as Ray tells it; 1 where nobody knows."""
        if self.deployment == "Complete" and self.job == "SUCCEEDED":
            return 0
        match = _EXIT_CODE.search(self.message)
        return int(match[1]) if match and int(match[1]) else 1

    def __str__(self) -> str:
        parts = [self.deployment or "not seen by the operator yet", self.job.lower()]
        tries = f"{self.failed_tries} failed {'try' if self.failed_tries == 1 else 'tries'}" if self.failed_tries else ""
        leaving = "being stopped" if self.is_leaving else ""
        return ", ".join(part for part in (*parts, tries, self.reason, leaving) if part)


def state_of(job: Mapping[str, Any]) -> JobState:
    """Whatever the operator has not written yet is empty."""
    metadata, status = job["metadata"], job.get("status") or {}
    labels, created = metadata.get("labels") or {}, metadata.get("creationTimestamp")
    return JobState(
        name=metadata["name"],
        pipeline=labels.get(f"{PREFIX}pipeline", ""),
        stage=labels.get(f"{PREFIX}stage", ""),
        deployment=status.get("jobDeploymentStatus", ""),
        job=status.get("jobStatus", ""),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        failed_tries=status.get("failed", 0),
        is_leaving="deletionTimestamp" in metadata,
        created=datetime.fromisoformat(created) if created else None,
    )
