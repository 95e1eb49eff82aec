"""Prompt tuning, prefix tuning and P-tuning with PEFT's encoders; what is written is what these say, without themselves."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, TaskType
from peft.tuners import PrefixEncoder, PromptEmbedding, PromptEncoder
from peft.utils.other import _prepare_prompt_learning_config
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig

from orchestrator.model.prompts import NAME, Prompts
from orchestrator.schema import PrefixTuning, PromptTuning, PTuning
from orchestrator.schema.methods import PromptMethod

_SMALL = 0.02
"""Keys and values begin near zero: of unit variance they would drown what the model was told."""


def add_prompts(model: Any, method: PromptMethod, seed: int) -> None:
    """Gives the model, a causal language model of transformers, virtual tokens that are random by `seed`."""
    decoder = model.get_submodule("model")
    embedding = decoder.get_submodule("embed_tokens")
    config: Any = prompt_config(method, model.config)
    torch.manual_seed(seed)
    kv_shape = None
    match method:
        case PromptTuning():
            encoder: nn.Module = PromptEmbedding(config, embedding)
        case PTuning():
            encoder = PromptEncoder(config)
        case PrefixTuning():
            encoder = PrefixEncoder(config)
            kv_shape = (config.num_layers, config.num_attention_heads, config.token_dim // config.num_attention_heads)
            if not method.projection:
                nn.init.normal_(encoder.embedding.weight, std=_SMALL)
    dtype = embedding.get_parameter("weight").dtype
    model.add_module(NAME, Prompts(encoder.to(dtype), method.virtual_tokens, kv_shape))


def prompt_config(method: PromptMethod, model_config: PreTrainedConfig, base_name: str | None = None) -> PeftConfig:
    """PEFT's description; with the base's name that of an adapter that was written."""
    common: dict[str, Any] = {
        "task_type": TaskType.CAUSAL_LM,
        "num_virtual_tokens": method.virtual_tokens,
        "num_transformer_submodules": 1,
        "base_model_name_or_path": base_name,
        "inference_mode": base_name is not None,
    }
    match method:
        case PromptTuning():
            config: PeftConfig = PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **common)
        case PTuning():
            layers: dict[str, Any] = {"encoder_num_layers": method.layers} if method.encoder == "lstm" else {}
            config = PromptEncoderConfig(
                encoder_reparameterization_type=method.encoder.upper(),
                encoder_hidden_size=method.hidden_size,
                encoder_dropout=method.dropout,
                **layers,
                **common,
            )
        case PrefixTuning():
            config = PrefixTuningConfig(
                prefix_projection=method.projection is not None, encoder_hidden_size=method.projection or 0, **common
            )
    return _prepare_prompt_learning_config(config, model_config)


def prompt_tensors(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT keeps: the virtual tokens themselves; `parameters` are those of the encoder, by their names in the model."""
    prompts = model.get_submodule(NAME)
    assert isinstance(prompts, Prompts)
    known = {name.removeprefix(f"{NAME}.encoder."): tensor for name, tensor in parameters.items()}
    indices = torch.arange(prompts.num_tokens)[None]
    was_training = prompts.training
    prompts.eval()
    with torch.no_grad():
        made = functional_call(prompts.encoder, known, (indices,))[0]
    prompts.train(was_training)
    return {"prompt_embeddings": made.contiguous()}
