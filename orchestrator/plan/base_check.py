"""What a base model can be asked to do, as far as its configuration and the headers of its files say it."""

from pathlib import Path

from orchestrator.contents import linear_layer_names
from orchestrator.schema import RandomBase, Recipe, TrainStage, VocabularyStage
from orchestrator.store import read_json

_LLAMA_LAYERS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
_KEEP_VOCABULARY = "keep a vocabulary stage; with merge: none it leaves the tokenizer as it is"


def problems_with_base(recipe: Recipe, base: Path | RandomBase) -> list[str]:
    """Everything that the recipe asks of the base and the base has not."""
    trained = {name: stage for name, stage in recipe.stages.items() if isinstance(stage, TrainStage)}
    found = [*_unknown_targets(trained, base), *_long_blocks(trained, base), *_cannot_merge(recipe, base)]
    if not any(isinstance(stage, VocabularyStage) for stage in recipe.stages.values()):
        found += _without_vocabulary_stage(trained, base)
    return found


def _unknown_targets(trained: dict[str, TrainStage], base: Path | RandomBase) -> list[str]:
    layers = _LLAMA_LAYERS if isinstance(base, RandomBase) else linear_layer_names(base)
    return [
        f"stages.{name}.lora.targets: {target} names no linear layer of this model; choose from {', '.join(layers)}"
        for name, stage in trained.items()
        for target in (stage.lora.targets if stage.lora else ())
        if target not in layers
    ]


def _long_blocks(trained: dict[str, TrainStage], base: Path | RandomBase) -> list[str]:
    positions = base.max_positions if isinstance(base, RandomBase) else _config(base).get("max_position_embeddings")
    return [
        f"stages.{name}.block_length: {stage.block_length:,} is longer than the base model's {positions:,} positions"
        for name, stage in trained.items()
        if positions and stage.block_length > positions
    ]


def _cannot_merge(recipe: Recipe, base: Path | RandomBase) -> list[str]:
    if isinstance(base, RandomBase) or (base / "tokenizer.model").is_file():
        return []
    return [
        f"stages.{name}.merge: {stage.merge} extends a SentencePiece model, and {base} has no tokenizer.model; "
        f"stages.{name}.merge=none keeps its tokenizer as it is"
        for name, stage in recipe.stages.items()
        if isinstance(stage, VocabularyStage) and stage.merge != "none"
    ]


def _without_vocabulary_stage(trained: dict[str, TrainStage], base: Path | RandomBase) -> list[str]:
    if isinstance(base, RandomBase):
        return [
            f"base_model: a random base gets its tokenizer from a vocabulary stage, and there is none; {_KEEP_VOCABULARY}"
        ]
    if _config(base).get("tie_word_embeddings", False) and any(stage.modules_to_save for stage in trained.values()):
        return [
            f"base_model: its head is tied to its embedding, so neither trains alone; {_KEEP_VOCABULARY}, and unties the two"
        ]
    return []


def _config(base: Path) -> dict:
    return read_json(base / "config.json")
