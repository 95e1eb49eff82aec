"""EleutherAI's lm-evaluation-harness, which asks a model the questions of known tasks, or of tasks of your own."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from orchestrator.errors import RecipeError

_REMEDY = "in the project's folder, pip install -c constraints.txt -e '.[evaluation]'"


def ask(
    model: Any, tokenizer: Any, tasks: Sequence[str], folder: Path | None, few_shot: int | None, limit: int | None
) -> dict[str, dict[str, float]]:
    """Each metric of each task by its name, such as acc, with its standard error as acc_stderr.

    `folder` describes tasks of one's own, in the harness's YAML. RecipeError for a task that there is not, or without the
    harness.
    """
    # It would ask where each dataset's code may be run; data is read, and no code of it.
    os.environ.setdefault("HF_DATASETS_TRUST_REMOTE_CODE", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        # An extra of this project, which need not be here.
        lm_eval = import_module("lm_eval")
        models, tasks_of = import_module("lm_eval.models.huggingface"), import_module("lm_eval.tasks")
    except ImportError as error:
        raise RecipeError(f"tasks: need the lm-evaluation-harness ({error}); {_REMEDY}") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(tasks_of.TaskManager, folder, has_known=False) if folder else None
    if manager is None or any(task not in manager.all_tasks for task in tasks):
        manager = _manager(tasks_of.TaskManager, folder, has_known=True)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        where = f"neither the harness nor {folder} has" if folder else "the harness has not"
        raise RecipeError(f"tasks: {', '.join(unknown)}: {where} such a task; see `lm_eval ls tasks`")
    asked = lm_eval.simple_evaluate(
        model=models.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=few_shot,
        limit=limit,
        log_samples=False,
        bootstrap_iters=0,
        random_seed=0,
        numpy_random_seed=0,
        torch_random_seed=0,
        fewshot_random_seed=0,
    )
    assert asked
    return {task: _metrics(found) for task, found in asked["results"].items()}


@cache
def _manager(make: Callable[..., Any], folder: Path | None, has_known: bool) -> Any:
    """Once for all models: to look through the thousands of tasks that are known takes seconds."""
    return make(include_path=str(folder) if folder else None, include_defaults=has_known)


def _metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """`acc,none` is called acc; what is no number is left out, such as a standard error that was not asked for."""
    named = {name.removesuffix(",none"): value for name, value in found.items()}
    return {name: float(value) for name, value in named.items() if isinstance(value, int | float) and name != "sample_len"}
