"""Base models as they come from disk, and as shapes without weights."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from orchestrator.contents import weight_files
from orchestrator.errors import ModelError
from orchestrator.plan.base_check import unsafe_files
from orchestrator.schema import Quantization

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_model(folder: Path, precision: str, quantization: Quantization | None = None) -> PreTrainedModel:
    """The causal language model of a folder, on CPU, in the given precision, with its cache off.

    With `quantization` the linear layers of the blocks are in fewer bits, on this process's GPU where there is one.

    Raises ModelError for another kind of model, for one without safetensors, and for files that could do more than be read.
    """
    _check_files(folder)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=DTYPES[precision],
        attn_implementation="sdpa",
        use_safetensors=True,
        trust_remote_code=False,
        **(_quantized(quantization, precision) if quantization else {}),
    )
    if not hasattr(model, "lm_head") or not hasattr(getattr(model, "model", None), "embed_tokens"):
        raise ModelError(f"{folder}: {type(model).__name__} is no LLaMA-family decoder (model.embed_tokens, lm_head)")
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # For a forward without gradients it would lay the weights out in another way, for good, where their rows are as
            # many as that wants, and fail where not.
            module.support_avx512bf16_for_cpu = False
    return model


def _quantized(quantization: Quantization, precision: str) -> dict[str, Any]:
    # It would say of every layer that its input is rounded.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if quantization.kind == "int8":
        bits = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    else:
        bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.kind,
            bnb_4bit_use_double_quant=quantization.double,
            bnb_4bit_compute_dtype=DTYPES[precision],
            llm_int8_skip_modules=["lm_head"],
        )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": bits, "device_map": {"": device}}


def weight_reader(folder: Path) -> Callable[[str], Tensor]:
    """Gives the weights of a folder by name, one at a time, as they are on disk."""
    file_of = {}
    for file in weight_files(folder):
        with safe_open(folder / file, framework="pt") as tensors:
            file_of |= dict.fromkeys(tensors.keys(), file)

    def read(name: str) -> Tensor:
        with safe_open(folder / file_of[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    return read


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
