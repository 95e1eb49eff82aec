"""What a base model can be asked to do, as far as its configuration and the headers of its files say it.

And whether its files are only read when it is loaded: it may come from anywhere.
"""

from pathlib import Path

from orchestrator.contents import has_biases, json_object, linear_layers
from orchestrator.errors import RecipeError
from orchestrator.plan.adaptation import adaptations
from orchestrator.plan.targets import TABLES, ends_in
from orchestrator.schema import (
    BitFit,
    Lora,
    Method,
    PromptMethod,
    RandomBase,
    Recipe,
    Subspace,
    TrainStage,
    VocabularyStage,
    WholeModelMethod,
)

_LLAMA_LAYERS = {"mlp": ("down_proj", "gate_proj", "up_proj"), "self_attn": ("k_proj", "o_proj", "q_proj", "v_proj")}
_KEEP_VOCABULARY = "keep a vocabulary stage; with merge: none it leaves the tokenizer as it is"


def problems_with_base(recipe: Recipe, base: Path | RandomBase) -> list[str]:
    """Everything that the recipe asks of the base and the base has not; of unsafe files nothing more is asked."""
    if isinstance(base, Path) and (unsafe := unsafe_files(base)):
        return [f"base_model: {problem}" for problem in unsafe]
    trained = {name: stage for name, stage in recipe.stages.items() if isinstance(stage, TrainStage)}
    found = [*_stored_quantized(base), *_misfits(recipe, base), *_long_blocks(trained, base), *_cannot_merge(recipe, base)]
    if not any(isinstance(stage, VocabularyStage) for stage in recipe.stages.values()):
        found += _without_vocabulary_stage(trained, base)
    return found


def unsafe_files(folder: Path) -> list[str]:
    """What in a model's folder would run code, load more than the model, or lead out of the folder; a line for each."""
    return [*_links_out(folder), *_own_code(folder), *_other_weights(folder)]


def _links_out(folder: Path) -> list[str]:
    """Files of a model are copied into artifacts, so a link to a private file would publish it."""
    folder = folder.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        # The hub's own cache keeps the files of all revisions here, and links to them.
        allowed.append(folder.parents[1] / "blobs")
    return [
        f"{path} is a link that leads out of the model's folder; put the file itself there"
        for path in sorted(folder.iterdir())
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed)
    ]


def _own_code(folder: Path) -> list[str]:
    return [
        f"{folder / name} asks for Python code of the model's own (auto_map), which is never run here; "
        "give a LLaMA-family decoder that transformers has the code of; if this is one, take auto_map out of that file"
        for name in ("config.json", "tokenizer_config.json")
        if (folder / name).is_file() and json_object(folder / name).get("auto_map")
    ]


def _other_weights(folder: Path) -> list[str]:
    """Two ways in which transformers loads what model.safetensors and its index do not name, pickles too."""
    found = []
    if (folder / "adapter_config.json").is_file():
        found.append(
            f"{folder} holds an adapter (adapter_config.json), which would be loaded with the model; "
            "take it out, or give the model with the adapter merged into it"
        )
    if other := _config(folder).get("transformers_weights"):
        found.append(
            f"{folder / 'config.json'} has its weights loaded from {other} (transformers_weights); "
            "name that file model.safetensors, and take the entry out"
        )
    return found


def layers_of(base: Path | RandomBase) -> tuple[str, ...]:
    """Full names of the linear layers in the blocks."""
    if isinstance(base, Path):
        return linear_layers(base)
    return tuple(
        f"model.layers.{number}.{part}.{name}"
        for number in range(base.num_layers)
        for part, names in _LLAMA_LAYERS.items()
        for name in names
    )


def _misfits(recipe: Recipe, base: Path | RandomBase) -> list[str]:
    """Methods that fit the model not, or each other."""
    found: list[str] = []
    try:
        adaptations(recipe, layers_of(base))
    except RecipeError as error:
        found += error.problems
    found += [*_dora_where_it_cannot_be(recipe), *_quantized_under_zero_3(recipe), *_subspace_under_zero_3(recipe)]
    biases = isinstance(base, Path) and has_biases(base)
    found += [
        f"stages.{name}.method: {word} trains biases, and this model has none; choose another method"
        for name, stage in recipe.stages.items()
        if isinstance(stage, TrainStage) and not biases and (word := _trains_biases(stage.method))
    ]
    return found


def _dora_where_it_cannot_be(recipe: Recipe) -> list[str]:
    """It takes lengths of whole rows of the weight at every step, and PEFT's of a table are of its columns."""
    found = []
    for name, stage in recipe.stages.items():
        if isinstance(stage, TrainStage) and isinstance(stage.method, Lora) and stage.method.dora:
            if recipe.zero == 3:
                found.append(
                    f"stages.{name}.method.dora: needs whole weights, which zero=3 cuts up; set zero=2, or leave it out"
                )
            if not isinstance(stage.method.targets, str) and any(ends_in(TABLES[0], each) for each in stage.method.targets):
                found.append(f"stages.{name}.method.dora: is for linear layers; leave embed_tokens out of the targets")
    return found


def _quantized_under_zero_3(recipe: Recipe) -> list[str]:
    """bitsandbytes puts parameters of its own in the place of those that DeepSpeed has cut up."""
    return [
        f"stages.{name}.quantization: zero=3 cuts weights up, which those of a few bits do not stand; set zero=2"
        for name, stage in recipe.stages.items()
        if recipe.zero == 3 and isinstance(stage, TrainStage) and stage.quantization
    ]


def _subspace_under_zero_3(recipe: Recipe) -> list[str]:
    return [
        f"stages.{name}.method: subspace moves whole weights, which zero=3 cuts up; set zero=2"
        for name, stage in recipe.stages.items()
        if recipe.zero == 3 and isinstance(stage, TrainStage) and isinstance(stage.method, Subspace)
    ]


def _trains_biases(method: Method | None) -> str:
    match method:
        case BitFit():
            return "bitfit"
        case Lora(bias="all" | "lora_only"):
            return f"bias: {method.bias}"
    return ""


def _stored_quantized(base: Path | RandomBase) -> list[str]:
    if isinstance(base, RandomBase) or not _config(base).get("quantization_config"):
        return []
    return [
        "base_model: its weights are stored in a few bits (quantization_config), into which nothing can be merged without "
        "loss; give the model as it was before, and quantization: nf4 in the stages that should train on few bits"
    ]


def _long_blocks(trained: dict[str, TrainStage], base: Path | RandomBase) -> list[str]:
    positions = base.max_positions if isinstance(base, RandomBase) else _config(base).get("max_position_embeddings")
    virtual = {
        name: stage.method.virtual_tokens if isinstance(stage.method, PromptMethod) else 0 for name, stage in trained.items()
    }
    added = {name: f" + {count:,} virtual tokens" if count else "" for name, count in virtual.items()}
    return [
        f"stages.{name}.block_length: {stage.block_length:,}{added[name]} is longer than the base model's "
        f"{positions:,} positions"
        for name, stage in trained.items()
        if positions and stage.block_length + virtual[name] > positions
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
    if _config(base).get("tie_word_embeddings", False) and any(_trains_tables(stage) for stage in trained.values()):
        return [
            f"base_model: its head is tied to its embedding, so neither trains alone; {_KEEP_VOCABULARY}, and unties the two"
        ]
    return []


def _trains_tables(stage: TrainStage) -> bool:
    adapted = isinstance(stage.method, Lora) and not isinstance(stage.method.targets, str) and stage.method.targets
    named = [table for table in TABLES for target in adapted or () if ends_in(table, target)]
    return bool(stage.modules_to_save or stage.new_rows or named or isinstance(stage.method, WholeModelMethod))


def _config(base: Path) -> dict:
    return json_object(base / "config.json")
