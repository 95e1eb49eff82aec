"""The export stage: what was learned, as one PEFT folder and as a merged Hugging Face model, compared with each other."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from orchestrator.checkpoint.adapter import read_adapter
from orchestrator.checkpoint.manifest import MANIFEST_NAME, read_manifest
from orchestrator.contents import TOKENIZER_FILES, weight_files
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.errors import TrainingError
from orchestrator.model.adapters import load_with_peft
from orchestrator.model.loading import DTYPES, load_model
from orchestrator.model.merge import write_merged
from orchestrator.schema import ExportStage
from orchestrator.stages.assignment import ExportAssignment

# A merged weight is rounded once, an adapter's output is added unrounded: in bf16 logits differ by a few of its steps.
_TOLERANCE = {"bf16": 0.05, "fp16": 0.01, "fp32": 1e-4}


def run_export(stage: ExportStage, assignment: ExportAssignment) -> dict[str, Any]:
    """Writes `adapter/` and `merged/`; TrainingError when the two do not compute the same."""
    folder, base = assignment.folder, assignment.base
    tensors = read_adapter(assignment.adapter, base, assignment.tokenizer)
    for name in ("adapter", "merged"):
        shutil.rmtree(folder / name, ignore_errors=True)
    _copy_adapter(assignment.adapter, folder / "adapter")
    results: dict[str, Any] = {"adapter_bytes": _bytes_of(folder / "adapter")}
    if stage.merged:
        merged = folder / "merged"
        merged.mkdir()
        write_merged(base, tensors, assignment.adaptation, merged, stage.max_shard_bytes)
        _copy_beside_weights(base, assignment.tokenizer, merged)
        results["merged_bytes"] = _bytes_of(merged)
        if stage.verify_tokens:
            results["merged_logit_difference"] = _compare(stage, assignment, merged)
    return results


def _copy_beside_weights(base: Path, tokenizer: Path, merged: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        if (base / name).is_file():
            shutil.copyfile(base / name, merged / name)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, merged / name)


def _copy_adapter(source: Path, target: Path) -> None:
    """What its manifest lists, which was verified, and nothing that somebody put beside it."""
    target.mkdir()
    for name in (*read_manifest(source).files, MANIFEST_NAME):
        shutil.copyfile(source / name, target / name)


def _compare(stage: ExportStage, assignment: ExportAssignment, merged: Path) -> float:
    """The largest difference of logits, relative to the largest logit."""
    ids = torch.arange(stage.verify_tokens)[None] % len(load_tokenizer(assignment.tokenizer))
    base = load_model(assignment.base, assignment.precision)
    adapted = _logits(load_with_peft(base, assignment.folder / "adapter"), ids)
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
