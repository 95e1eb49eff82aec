"""What a person would want to know of a stage that is done, a line each."""

from typing import Any

from orchestrator.plan.plan import PlannedStage
from orchestrator.report.history import described
from orchestrator.report.words import duration, size
from orchestrator.schema import EvaluationStage, ExportStage, MergeStage, VocabularyStage


def findings(planned: PlannedStage, results: dict[str, Any]) -> list[str]:
    """From its record's results."""
    if isinstance(planned.stage, VocabularyStage):
        return _vocabulary_findings(results)
    if isinstance(planned.stage, MergeStage):
        return [f"a model of {size(results['merged_bytes'])}", f"done in {duration(results['seconds'])}"]
    if isinstance(planned.stage, EvaluationStage):
        return [f"{len(results['models'])} models measured", f"done in {duration(results['seconds'])}"]
    if isinstance(planned.stage, ExportStage):
        difference = results.get("merged_logit_difference")
        return (
            [f"merged and adapter agree: logits differ by at most {difference:.2g} of the largest"]
            if difference is not None
            else []
        )
    trainable, total = results["trainable"], results["parameters"]
    lines = [f"trained {trainable:,} of {total:,} parameters ({trainable / total:.2%})"]
    for name, values in results["held_out"].items():
        before, after, base = (
            part["bits_per_character"] for part in (values["before"], values["after"], results["reference"][name])
        )
        lines.append(f"{name}: {before:.3f} → {after:.3f} bits per character (base {base:.3f})")
    if results.get("kept_step") != results.get("steps"):
        lines.append(f"kept the state of step {results['kept_step']:,}, the best of {results['steps']:,} steps")
    if samples := next((row["samples"] for row in reversed(results.get("evaluations", ())) if row["samples"]), ()):
        lines += [f"{sample['prompt']!r} → {sample['text']!r}" for sample in samples]
    if step := results.get("step"):
        lines.append(_step_in_words(step))
    if results["checkpoint_bytes"]:
        # Of each parameter that learns: an fp32 master and Adam's two moments.
        whole = results["checkpoint_bytes"] * total / trainable
        lines.append(f"checkpoints of {size(results['checkpoint_bytes'])}; with the whole model in them {size(whole)}")
    if happened := described(results["history"]):
        lines.append(happened)
    return [*lines, f"done in {duration(results['seconds'])}"]


def _step_in_words(step: dict[str, float]) -> str:
    """Medians over the steps; their parts as shares, the largest first."""
    parts = {name.removesuffix("_seconds"): value for name, value in step.items() if name.endswith("_seconds")}
    shares = sorted(((value / step["seconds"], name) for name, value in parts.items()), reverse=True)
    listed = ", ".join(f"{name} {share:.0%}" for share, name in shares if share >= 0.005)
    of_peak = f"; {step['flops_utilisation']:.0%} of the devices' peak" if "flops_utilisation" in step else ""
    return f"a step took {step['seconds']:.3g}s: {listed}{of_peak}"


def _vocabulary_findings(results: dict[str, Any]) -> list[str]:
    base, added, total, rows = (results.get(name, 0) for name in ("base_tokens", "added_tokens", "tokens", "rows"))
    lines = [f"{base:,} tokens + {added:,} new = {total:,}, in {rows:,} rows"]
    if dropped := results.get("dropped_pieces"):
        lines.append("left out: " + ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in dropped.items()))
    for name, counts in results.get("compression", {}).items():
        before, after = counts["tokens_per_character_before"], counts["tokens_per_character_after"]
        lines.append(f"{name.replace('_', ' ')}: {before:.3f} → {after:.3f} tokens per character")
    return [*lines, f"done in {duration(results['seconds'])}"]
