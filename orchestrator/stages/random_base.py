"""A LLaMA of random weights: a base model to try things on, without a download."""

import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from orchestrator.schema.recipe import RandomBase
from orchestrator.store import write_json
from orchestrator.vocabulary.pieces import processor, read_model


def write_random_base(base: RandomBase, tokenizer_model: Path, folder: Path, seed: int) -> None:
    """Writes a Hugging Face folder, in bf16, with a SentencePiece model as its tokenizer; the same bytes for a seed."""
    pieces = processor(read_model(tokenizer_model))
    config = LlamaConfig(
        vocab_size=pieces.get_piece_size(),
        hidden_size=base.hidden_size,
        intermediate_size=base.intermediate_size,
        num_hidden_layers=base.num_layers,
        num_attention_heads=base.num_heads,
        num_key_value_heads=base.num_key_value_heads,
        max_position_embeddings=base.max_positions,
        tie_word_embeddings=base.tie_word_embeddings,
        bos_token_id=pieces.bos_id(),
        eos_token_id=pieces.eos_id(),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).bfloat16()
    transformers_logging.disable_progress_bar()
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder)
    shutil.copyfile(tokenizer_model, folder / "tokenizer.model")
    special = {role: pieces.id_to_piece(getattr(pieces, f"{role}_id")()) for role in ("bos", "eos", "unk")}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            **{f"{role}_token": piece for role, piece in special.items()},
            "add_bos_token": True,
            "model_max_length": base.max_positions,
        },
    )
