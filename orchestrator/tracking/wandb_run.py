"""Starts a run in wandb that is silent, asks nobody to log in and tells nothing but what it is told.

What wandb would collect by itself is turned off: the command line, the code, git and the installed packages.
Only the machine's load is left on.
"""

import logging
import os
import re
from collections.abc import Mapping
from typing import Any, Literal

import wandb

from orchestrator.schema.execution import WandbTracking
from orchestrator.tracking.run_description import RunDescription

_logger = logging.getLogger(__name__)

_INIT_TIMEOUT_SECONDS = 30.0
"""How long a server that cannot be reached may hold up the start of a stage; wandb's own default is 90."""
_FINISH_TIMEOUT_SECONDS = 60.0
"""How long it may hold up the end; wandb waits forever by default. What was not sent stays on disk for `wandb sync`."""


def start_run(tracking: WandbTracking, description: RunDescription) -> wandb.Run:
    """Raises whatever wandb raises, and OSError where its folder cannot be made."""
    # Where it cannot make this folder, wandb would go on in the system's temporary folder.
    (description.folder / "wandb").mkdir(parents=True, exist_ok=True)
    # For the whole process, because what wandb prints outside a run, such as at login, obeys only these.
    wandb.setup(_settings())
    run = wandb.init(
        mode=_mode(tracking),
        project=tracking.project,
        id=re.sub(r"[^A-Za-z0-9_-]", "-", description.id),
        name=description.name,
        group=description.group,
        job_type=description.job_type,
        tags=description.tags,
        config=dict(description.config),
        dir=description.folder,
        resume="allow",
        # A run that an earlier stage of this process left open is not ours to write to.
        reinit="create_new",
    )
    # wandb's own step counts calls and starts again with every attempt.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    _logger.info("wandb mirrors the metrics to %s", run.url or run.dir)
    return run


def finish_run(run: wandb.Run | None, summary: Mapping[str, Any], exit_code: int) -> None:
    """Ends the run, if it was started, and wandb's service with every other run of this process."""
    try:
        if run is not None:
            run.summary.update(dict(summary))
            run.finish(exit_code=exit_code)
    finally:
        _stop_service()


def _stop_service() -> None:
    # `finish` returned before the service had written its file in some tests; `teardown` waits for it to leave.
    try:
        wandb.teardown()
    except SystemExit as error:
        raise RuntimeError(f"the service of wandb exited with {error.code}") from error


def _settings() -> wandb.Settings:
    return wandb.Settings(
        silent=True,
        quiet=True,
        console="off",
        disable_code=True,
        save_code=False,
        disable_git=True,
        disable_job_creation=True,
        x_save_requirements=False,
        x_disable_meta=True,
        use_dot_wandb=False,
        # SageMaker's id and group would replace ours.
        sagemaker_disable=True,
        # Another attempt may compute the same stage with another micro-batch.
        allow_val_change=True,
        init_timeout=_INIT_TIMEOUT_SECONDS,
        finish_timeout=_FINISH_TIMEOUT_SECONDS,
        finish_timeout_raises=True,
    )


def _mode(tracking: WandbTracking) -> Literal["online", "offline"]:
    asked = os.environ.get("WANDB_MODE") or tracking.mode
    if asked in ("offline", "dryrun"):
        return "offline"
    # Without `verify` this looks for a key in the environment and in netrc, and asks no server.
    if wandb.login(prompt=False, verify=False):
        return "online"
    if asked != "auto":
        _logger.warning("wandb runs offline although %s was asked for: set WANDB_API_KEY, or run `wandb login`", asked)
    return "offline"
