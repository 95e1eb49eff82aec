"""What a recipe names outside itself, found and hashed before anything is planned or started."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from orchestrator.contents import (
    DataFile,
    base_model_folder,
    base_model_hash,
    data_hash,
    find_data,
    tokenizer_hash,
)
from orchestrator.errors import DataError, OrchestratorError, RecipeError
from orchestrator.plan.base_check import layers_of, problems_with_base
from orchestrator.plan.plan import Contents
from orchestrator.schema import (
    EvaluationStage,
    ExportStage,
    HeldOutShare,
    MergeStage,
    RandomBase,
    Recipe,
    Stage,
    TrainStage,
    WeightedSource,
    WeightedSources,
)
from orchestrator.schema.credentials import fields_with_credentials
from orchestrator.store import sha256_file, sha256_value


@dataclass(frozen=True)
class Inputs:
    """The files behind a recipe."""

    base: Path | RandomBase
    base_text: tuple[DataFile, ...]
    """What a random base's tokenizer is trained on."""
    data: dict[str, tuple[DataFile, ...]]
    """By stage, of each stage that reads data."""
    held_out: dict[str, tuple[DataFile, ...]]
    """Validation and retention text and instructions, where the recipe has them."""
    contents: Contents


def find_inputs(recipe: Recipe) -> Inputs:
    """Finds and hashes all files that the recipe names; RecipeError lists everything that is missing."""
    check_credentials(recipe)
    problems = _Problems()
    base: Path | RandomBase | None = None
    base_text: tuple[DataFile, ...] = ()
    data: dict[str, tuple[DataFile, ...]] = {}
    held_out: dict[str, tuple[DataFile, ...]] = {}
    sentencepiece_model: str | None = None
    asked: dict[str, str] = {}
    with problems.collected():
        base, base_text = _base(recipe)
    for name, stage in recipe.stages.items():
        with problems.collected():
            if files := _stage_data(name, stage, recipe):
                data[name] = files
        with problems.collected():
            sentencepiece_model = sentencepiece_model or _sentencepiece_hash(name, stage)
        with problems.collected():
            asked |= {name: _asked_hash(name, stage)} if isinstance(stage, EvaluationStage) else {}
    with problems.collected():
        if files := _validation(recipe):
            held_out["validation"] = files
    with problems.collected():
        if recipe.validation_instructions:
            held_out["instructions"] = find_data("validation_instructions", recipe.validation_instructions)
    with problems.collected():
        held_out |= {"retention": find_data("retention.text", recipe.retention.text)} if recipe.retention else {}
    problems.found += _without_judge(recipe)
    if base is not None:
        problems.found += problems_with_base(recipe, base)
    if problems.found or base is None:
        raise RecipeError(problems.found)
    contents = _contents(base, base_text, data, sentencepiece_model)
    hashes = {name: data_hash(files) for name, files in held_out.items()}
    return Inputs(base, base_text, data, held_out, replace(contents, held_out=hashes, data=contents.data | asked))


def check_credentials(recipe: Recipe) -> None:
    """RecipeError names each field with a credential in it. Asked before anything else: other errors repeat the URLs that
    they are about, and so do records and manifests."""
    if fields := fields_with_credentials(recipe):
        raise RecipeError(
            f"{field}: a URL in it carries a password, key or token, which would go into every record; "
            "take that out: credentials come from the environment, or from the file where their own tool keeps them"
            for field in dict.fromkeys(fields)
        )


@dataclass
class _Problems:
    found: list[str] = field(default_factory=list)

    @contextmanager
    def collected(self) -> Iterator[None]:
        try:
            yield
        except OrchestratorError as error:
            if str(error) not in self.found:
                self.found.append(str(error))


def _without_judge(recipe: Recipe) -> list[str]:
    """Stages that keep their best state by a set which the recipe does not hold out."""
    held_out = {
        "validation": recipe.validation,
        "instructions": recipe.validation_instructions,
        "retention": recipe.retention,
    }
    words = {"validation": "validation", "instructions": "validation_instructions", "retention": "retention"}
    return [
        f"stages.{name}.keep_best.of: nothing is held out as {stage.keep_best.of}; give {words[stage.keep_best.of]}"
        for name, stage in recipe.stages.items()
        if isinstance(stage, TrainStage) and stage.keep_best and not held_out[stage.keep_best.of]
    ]


def _base(recipe: Recipe) -> tuple[Path | RandomBase, tuple[DataFile, ...]]:
    if isinstance(recipe.base_model, RandomBase):
        return recipe.base_model, find_data("base_model.text", recipe.base_model.text)
    return base_model_folder(recipe.base_model), ()


def _stage_data(name: str, stage: Stage, recipe: Recipe) -> tuple[DataFile, ...]:
    """The stage's own sources, or the recipe's; nothing for a stage that reads none."""
    if isinstance(stage, ExportStage | MergeStage | EvaluationStage) or (
        stage.kind == "vocabulary" and stage.sentencepiece_model
    ):
        return ()
    if stage.kind == "vocabulary" and stage.merge == "none":
        return ()
    if stage.data:
        return _find(f"stages.{name}.data", stage.data)
    word = "instructions" if isinstance(stage, TrainStage) and stage.objective == "answers" else "text"
    sources = getattr(recipe, word)
    if not sources:
        raise DataError(f"{word}: is empty, and stages.{name} learns from it; give files, folders, globs or hub ids")
    files = _find(word, sources)
    # The tokenizer is trained on each document once, however often it is learned.
    return files if isinstance(stage, TrainStage) else _without_weights(files)


def _validation(recipe: Recipe) -> tuple[DataFile, ...]:
    """The text that is held out or, where that is a share, the text that it is a share of."""
    if not isinstance(recipe.validation, HeldOutShare):
        return find_data("validation", recipe.validation) if recipe.validation else ()
    if not recipe.text:
        raise DataError("validation.share: there is no text to hold out a share of; give `text`, or files to validate on")
    return _without_weights(_find("text", recipe.text))


def _find(field: str, sources: WeightedSources) -> tuple[DataFile, ...]:
    found: list[DataFile] = []
    for source in sources:
        if isinstance(source, WeightedSource):
            found += (replace(file, weight=source.weight) for file in find_data(field, [source.path]))
        else:
            found += find_data(field, [source])
    return tuple(found)


def _without_weights(files: tuple[DataFile, ...]) -> tuple[DataFile, ...]:
    return tuple(replace(file, weight=1.0) for file in files)


def _sentencepiece_hash(name: str, stage: Stage) -> str | None:
    if stage.kind != "vocabulary" or not stage.sentencepiece_model:
        return None
    path = Path(stage.sentencepiece_model).expanduser()
    if not path.is_file():
        raise DataError(f"stages.{name}.sentencepiece_model: {path} is no file (looked in {Path.cwd()})")
    return sha256_file(path)


def _asked_hash(name: str, stage: EvaluationStage) -> str:
    """Of the prompts and tasks that it brings; DataError where they are not there."""
    found: dict[str, str] = {}
    if stage.prompts is not None:
        read_prompts(name, stage)
        found["prompts"] = sha256_file(Path(stage.prompts).expanduser())
    if stage.task_folder is not None:
        folder = Path(stage.task_folder).expanduser()
        if not folder.is_dir():
            raise DataError(f"stages.{name}.task_folder: {folder} is no folder (looked in {Path.cwd()})")
        files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        found |= {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
    return sha256_value(found)


def read_prompts(name: str, stage: EvaluationStage) -> tuple[str, ...]:
    """Those of the stage's own file, a line each; DataError where it has none."""
    assert stage.prompts is not None
    path = Path(stage.prompts).expanduser()
    if not path.is_file():
        raise DataError(f"stages.{name}.prompts: {path} is no file (looked in {Path.cwd()})")
    prompts = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not prompts:
        raise DataError(f"stages.{name}.prompts: {path} holds no prompt; write one on each line")
    return prompts


def _contents(
    base: Path | RandomBase, base_text: tuple[DataFile, ...], data: dict[str, tuple[DataFile, ...]], model: str | None
) -> Contents:
    hashes = {name: data_hash(files) for name, files in data.items()}
    if isinstance(base, RandomBase):
        recipe_of_base = [base.model_dump(mode="json", exclude={"text"}), data_hash(base_text)]
        return Contents(sha256_value(recipe_of_base), sha256_value(recipe_of_base), hashes, model, layers_of(base))
    return Contents(base_model_hash(base), tokenizer_hash(base), hashes, model, layers_of(base))
