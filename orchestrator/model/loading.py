"""Base models as they come from disk, and as shapes without weights."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from orchestrator.errors import ModelError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_model(folder: Path, precision: str) -> PreTrainedModel:
    """The causal language model of a folder, on CPU, in the given precision, with its cache off."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=DTYPES[precision], attn_implementation="sdpa")
    if not hasattr(model, "lm_head") or not hasattr(getattr(model, "model", None), "embed_tokens"):
        raise ModelError(f"{folder}: {type(model).__name__} is no LLaMA-family decoder (model.embed_tokens, lm_head)")
    model.config.use_cache = False
    return model


def shape_model(folder: Path, vocabulary_size: int | None = None) -> PreTrainedModel:
    """The same model on torch's meta device: names and shapes, no weights."""
    config = AutoConfig.from_pretrained(str(folder))
    if vocabulary_size:
        config.vocab_size = vocabulary_size
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
