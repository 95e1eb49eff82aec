"""The evaluation stage: the base, what each stage left and the exported model, measured side by side with stock tools.

It leaves `table.md`, and all that was measured in its record.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from orchestrator.checkpoint.manifest import check_belongs, check_files, read_manifest
from orchestrator.data.batches import IGNORED, evaluation_batches
from orchestrator.data.rows import PreparedRows
from orchestrator.data.templates import prompt_ids
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.model.adapters import load_adapter
from orchestrator.model.loading import load_model
from orchestrator.model.loss import held_out_numbers
from orchestrator.report.evaluation import table
from orchestrator.schema import EvaluationStage
from orchestrator.stages.assignment import EvaluatedModel, EvaluationAssignment, Results
from orchestrator.stages.harness import ask
from orchestrator.tracking import start_mirror

_ROWS_AT_ONCE = 4


def run_evaluation(stage: EvaluationStage, assignment: EvaluationAssignment) -> Results:
    """Measures one model after another; ModelError where an adapter is not the one that was written for its base."""
    torch.set_num_threads(assignment.threads)
    mirror = start_mirror(assignment.tracking, assignment.run)
    exit_code = 1
    found: list[dict[str, Any]] = []
    try:
        found += [_measured(stage, assignment, model) for model in assignment.models]
        exit_code = 0
    finally:
        mirror.finish(_flat(found), exit_code)
    (assignment.folder / "table.md").write_text(table(found), encoding="utf-8")
    return {"models": found}


def _measured(stage: EvaluationStage, assignment: EvaluationAssignment, described: EvaluatedModel) -> dict[str, Any]:
    model, tokenizer = _loaded(described, assignment.precision), load_tokenizer(described.tokenizer)
    found: dict[str, Any] = {"name": described.name, "held_out": {}, "samples": [], "tasks": {}}
    for text in described.held_out:
        rows = PreparedRows.open(text.rows)
        summary = rows.summary
        found["held_out"][text.name] = held_out_numbers(
            _nats(model, rows), summary.targets, summary.characters, summary.text_bytes
        )
    for prompt in assignment.prompts if stage.sample_tokens else ():
        ids = torch.tensor([prompt_ids(tokenizer, described.manner, prompt)], device=model.device)
        text = tokenizer.decode(_written(model, ids, stage.sample_tokens, tokenizer), skip_special_tokens=True)
        found["samples"].append({"prompt": prompt, "text": text})
    if stage.tasks:
        folder = Path(stage.task_folder).expanduser() if stage.task_folder else None
        found["tasks"] = ask(model, tokenizer, stage.tasks, folder, stage.few_shot, stage.limit)
    return found


def _loaded(described: EvaluatedModel, precision: str) -> Any:
    """As anyone's script loads it, on this process's GPU where there is one."""
    model: Any = load_model(described.base, precision)
    if described.adapter:
        manifest = read_manifest(described.adapter)
        check_files(described.adapter, manifest)
        check_belongs(described.adapter, manifest, described.base, described.tokenizer)
        model = load_adapter(model, described.adapter)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.no_grad()
def _nats(model: Any, rows: PreparedRows) -> float:
    """The summed loss over all rows."""
    total = 0.0
    for batch in evaluation_batches(rows, _ROWS_AT_ONCE, 0, 1):
        ids, labels, _ = batch.on(model.device)
        # Virtual tokens, where there are any, come before the others.
        logits = model(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] : -1]
        total += _summed_loss(logits, labels[:, 1:])
    return total


def _summed_loss(logits: Tensor, targets: Tensor) -> float:
    chosen = targets != IGNORED
    return cross_entropy(logits[chosen].float(), targets[chosen], reduction="sum").item()


@torch.no_grad()
def _written(model: Any, ids: Tensor, most: int, tokenizer: Any) -> list[int]:
    """The likeliest token, one after another."""
    wanted = {"max_new_tokens": most, "do_sample": False, "use_cache": True, "pad_token_id": tokenizer.eos_token_id}
    given = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), eos_token_id=tokenizer.eos_token_id, **wanted)
    return cast("list[int]", given[0, ids.shape[1] :].tolist())


def _flat(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`instruct/validation/bits_per_byte` and the like, as wandb's summary has them."""
    return {
        f"{model['name']}/{group}/{name}": value
        for model in found
        for part in ("held_out", "tasks")
        for group, values in model[part].items()
        for name, value in values.items()
    }
