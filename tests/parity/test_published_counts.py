"""The published Chinese-LLaMA 7B: what each of its stages trains, to the parameter, on shapes without weights."""

from pathlib import Path

import pytest
from torch import nn
from transformers import LlamaConfig

from orchestrator.compose import compose
from orchestrator.model.adapters import attach, count_parameters
from orchestrator.model.loading import shape_model
from orchestrator.plan.adaptation import adaptations

# Chinese-LLaMA-Alpaca's wiki, Training-Details: 2.97 %, 6.06 % and 6.22 % of the parameters. The counts behind these shares
# follow from LLaMA-7B's shapes; a [PAD] piece came between the second stage and the third.
PUBLISHED = [
    ("embeddings", 49_953, 204_607_488, 6_885_486_592, 2.97),
    ("attention", 49_953, 417_603_584, 6_893_875_200, 6.06),
    ("instruct", 49_954, 429_211_648, 6_905_483_264, 6.22),
]


def linear_layer_names(model: nn.Module) -> list[str]:
    """In the blocks."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-7b")
    LlamaConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("stage", "vocabulary_size", "trained", "total", "percent"), PUBLISHED)
def test_a_stage_trains_exactly_what_was_published(llama_7b, stage, vocabulary_size, trained, total, percent):
    recipe = compose(["recipe=chinese_llama_published", "scale=7b"])
    model = shape_model(llama_7b, vocabulary_size)
    attach(model, adaptations(recipe, linear_layer_names(model))[stage], recipe.seed)
    assert count_parameters(model) == (trained, total)
    assert round(100 * trained / total, 2) == percent
    assert all(parameter.is_meta for parameter in model.parameters())
