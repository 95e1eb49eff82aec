"""The export stage: what was learned, as one PEFT folder and as a merged Hugging Face model, compared with each other.

The merge stage leaves the model alone, for other stages to start from.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from orchestrator.checkpoint.adapter import read_adapter
from orchestrator.checkpoint.manifest import MANIFEST_NAME, read_manifest
from orchestrator.checkpoint.whole_model import copy_beside_weights
from orchestrator.contents import weight_files
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.errors import TrainingError
from orchestrator.model.adapters import load_adapter, merge_rule, peft_config, read_merge_rule
from orchestrator.model.loading import DTYPES, load_model
from orchestrator.model.merge import write_merged
from orchestrator.plan.adaptation import Adaptation
from orchestrator.schema import ExportStage, MergeStage
from orchestrator.stages.assignment import ExportAssignment

CARD_NAME = "README.md"
"""Where a hub looks for what a model is."""
# A merged weight is rounded once, an adapter's output is added unrounded: in bf16 logits differ by a few of its steps.
_TOLERANCE = {"bf16": 0.05, "fp16": 0.01, "fp32": 1e-4}


def run_export(stage: ExportStage, assignment: ExportAssignment) -> dict[str, Any]:
    """Writes `adapter/` and `merged/`; TrainingError when the two do not compute the same.

    What was learned in the model itself leaves no adapter.
    """
    folder = assignment.folder
    for name in ("adapter", "merged"):
        shutil.rmtree(folder / name, ignore_errors=True)
    results: dict[str, Any] = {}
    if assignment.adapter:
        _copy_adapter(assignment.adapter, folder / "adapter")
        _write_card(assignment, folder / "adapter")
        results["adapter_bytes"] = _bytes_of(folder / "adapter")
    if stage.merged:
        merged = folder / "merged"
        write_model(assignment, merged, stage.max_shard_bytes)
        _write_card(assignment, merged)
        results["merged_bytes"] = _bytes_of(merged)
        if stage.verify_tokens and assignment.adapter:
            results["merged_logit_difference"] = _compare(stage, assignment, merged)
    return results


def run_merge(stage: MergeStage, assignment: ExportAssignment) -> dict[str, Any]:
    """Writes `model/`, the base of what follows."""
    model = assignment.folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    write_model(assignment, model, stage.max_shard_bytes)
    return {"merged_bytes": _bytes_of(model)}


def write_model(assignment: ExportAssignment, folder: Path, max_shard_bytes: int) -> None:
    """Base and adapter as one model with its tokenizer; ModelError for an adapter that is not what was written."""
    folder.mkdir()
    tensors, rule = {}, merge_rule(peft_config(Adaptation()))
    if assignment.adapter:
        tensors = read_adapter(assignment.adapter, assignment.base, assignment.tokenizer)
        rule = read_merge_rule(assignment.adapter)
    write_merged(assignment.base, tensors, rule, folder, max_shard_bytes)
    copy_beside_weights(assignment.base, assignment.tokenizer, folder)


def _write_card(assignment: ExportAssignment, folder: Path) -> None:
    if card := assignment.cards.get(folder.name):
        (folder / CARD_NAME).write_text(card, encoding="utf-8")


def _copy_adapter(source: Path, target: Path) -> None:
    """What its manifest lists, which was verified, and nothing that somebody put beside it."""
    target.mkdir()
    for name in (*read_manifest(source).files, MANIFEST_NAME):
        shutil.copyfile(source / name, target / name)


def _compare(stage: ExportStage, assignment: ExportAssignment, merged: Path) -> float:
    """The largest difference of logits, relative to the largest logit."""
    ids = torch.arange(stage.verify_tokens)[None] % len(load_tokenizer(assignment.tokenizer))
    base = load_model(assignment.base, assignment.precision)
    adapted = _logits(load_adapter(base, assignment.folder / "adapter"), ids)
    difference = (_logits(load_model(merged, assignment.precision), ids) - adapted).abs().max() / adapted.abs().max()
    tolerance = _tolerance(assignment.precision, merged)
    # Turned around, so that NaN is no agreement.
    if not difference <= tolerance:
        raise TrainingError(
            f"{merged}: its logits differ from base and adapter by {difference:.3g} of the largest; "
            f"at most {tolerance:g} is rounding"
        )
    return difference.item()


def _tolerance(precision: str, merged: Path) -> float:
    """Of the coarser of two roundings: of what is computed, and of what is stored, which is the base's own dtype."""
    with safe_open(merged / weight_files(merged)[0], framework="pt") as file:
        stored = file.get_tensor(next(iter(file.keys()))).dtype
    return max(_TOLERANCE[name] for name, dtype in DTYPES.items() if name == precision or dtype == stored)


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids, use_cache=False).logits.float()


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
