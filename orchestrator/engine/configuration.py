"""What DeepSpeed and Adam are told of a run."""

from typing import Any

from torch import nn

from orchestrator.engine.values import EngineSettings


def parameter_groups(model: nn.Module, settings: EngineSettings) -> tuple[list[float], list[dict[str, Any]]]:
    """What learns, as Adam groups it by how fast, and how fast each group does."""
    by_factor: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_factor.setdefault(settings.faster.get(name, 1.0), []).append(parameter)
    return list(by_factor), [{"params": parameters} for parameters in by_factor.values()]


def deepspeed_config(settings: EngineSettings, on_gpu: bool) -> dict[str, Any]:
    """ZeRO, precision and batch; the optimizer is ours."""
    return {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": settings.max_gradient_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": settings.zero,
            "contiguous_gradients": True,
            "overlap_comm": on_gpu,
            # A buffer of that many values is made, and made twice where communication overlaps; larger gradients need none.
            "reduce_bucket_size": 1 << 23,
            # Small tensors such as LoRA factors are partitioned too: their optimizer state must not differ by size.
            "stage3_param_persistence_threshold": 0,
        },
        "bf16": {"enabled": settings.precision == "bf16"},
        "fp16": {"enabled": settings.precision == "fp16", "initial_scale_power": 16, "min_loss_scale": 1},
        "steps_per_print": 1 << 40,
    }
