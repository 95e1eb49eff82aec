"""Base models as they come from disk, and as shapes without weights."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from orchestrator.contents import weight_files
from orchestrator.errors import ModelError
from orchestrator.plan.base_check import unsafe_files

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_model(folder: Path, precision: str) -> PreTrainedModel:
    """The causal language model of a folder, on CPU, in the given precision, with its cache off.

    Raises ModelError for another kind of model, for one without safetensors, and for files that could do more than be read.
    """
    _check_files(folder)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=DTYPES[precision], attn_implementation="sdpa", use_safetensors=True, trust_remote_code=False
    )
    if not hasattr(model, "lm_head") or not hasattr(getattr(model, "model", None), "embed_tokens"):
        raise ModelError(f"{folder}: {type(model).__name__} is no LLaMA-family decoder (model.embed_tokens, lm_head)")
    model.config.use_cache = False
    return model


def leave_file(model: PreTrainedModel) -> None:
    """Gives each parameter memory of its own. As loaded all are views of the file, which stays in memory with the last
    of them, also for those that ZeRO has moved elsewhere."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def load_config(folder: Path) -> PreTrainedConfig:
    """What the model of a folder is; of its own code nothing runs."""
    return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)


def shape_model(folder: Path, vocabulary_size: int | None = None) -> PreTrainedModel:
    """The same model on torch's meta device: names and shapes, no weights."""
    config = load_config(folder)
    if vocabulary_size:
        config.vocab_size = vocabulary_size
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _check_files(folder: Path) -> None:
    """Once more than at planning: what an earlier stage left may have come from another machine since."""
    if problems := unsafe_files(folder):
        raise ModelError("\n".join(problems))
    if not weight_files(folder):
        raise ModelError(f"{folder} has no weights in safetensors")
