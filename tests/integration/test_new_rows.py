"""A pipeline in which only the rows of the added tokens learn, by the command, on two workers under ZeRO-3."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.command import run_command
from tests.shared_data import SHARED, needs

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    needs("stories260k", "text/luxun_train.jsonl", "text/luxun_validation.jsonl"),
]


def test_the_rest_stays_the_base_to_the_bit(tmp_path: Path) -> None:
    words = [
        f"base_model={SHARED}/stories260k",
        f"text={SHARED}/text/luxun_train.jsonl",
        f"validation={SHARED}/text/luxun_validation.jsonl",
        "stages.embeddings.modules_to_save=[]",
        "stages.embeddings.new_rows=[embed_tokens,lm_head]",
        "stages.embeddings.steps=6",
        "~stages.attention",
        "~stages.instruct",
    ]
    completed = run_command([*words, "workers=2", "zero=3", "run_root=runs", "stage=all"], tmp_path, seconds=400)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert "new rows of embed_tokens, lm_head" in completed.stdout
    folders = {path.name.split("-")[0]: path for path in (tmp_path / "runs").iterdir() if path.is_dir()}
    records = {
        name: json.loads((folders[name] / "record.json").read_text(encoding="utf-8"))["results"]
        for name in ("vocabulary", "embeddings")
    }
    old, rows = records["vocabulary"]["base_tokens"], records["vocabulary"]["rows"]
    tensors = load_file(folders["embeddings"] / "adapter" / "adapter_model.safetensors")
    assert {tensor.shape[0] for tensor in tensors.values()} == {rows - old}
    assert records["embeddings"]["trainable"] == sum(tensor.numel() for tensor in tensors.values())
    held_out = records["embeddings"]["held_out"]["validation"]
    assert held_out["after"]["loss"] < held_out["before"]["loss"]
    # The export stage has compared it with what PEFT makes of base and adapter.
    base = load_file(folders["vocabulary"] / "base" / "model.safetensors")
    merged = load_file(folders["export"] / "merged" / "model.safetensors")
    for key, tensor in merged.items():
        is_table = key in ("model.embed_tokens.weight", "lm_head.weight")
        kept = slice(0, old) if is_table else slice(None)
        assert torch.equal(tensor[kept], base[key][kept]), key
        assert not is_table or not torch.equal(tensor[old:], base[key][old:]), key
