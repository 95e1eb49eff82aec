"""From YAML and words on a command line to a typed recipe. Hydra and OmegaConf are spoken here and nowhere above.

Every problem is reported at once, each with the recipe's own path, what was given, what would be right,
and the file or override that set it.
"""

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from yaml import YAMLError

from orchestrator.errors import RecipeError
from orchestrator.schema import Recipe
from orchestrator.schema.paths import allowed_keys, recipe_path

RECIPES_FOLDER = Path(__file__).resolve().parents[1] / "recipes"
CONFIG_NAME = "config"
_KIND = re.compile(r"\{(.*[,\s])?kind\s*:")
_WORD = re.compile(r"~.|\+{0,2}[^=+~]+=")
_URL = re.compile(r"(\w+://)[^\s'\"]*")
_PLAIN_TYPES = {"tuple_type": "list", "model_type": "mapping", "model_attributes_type": "mapping", "dict_type": "mapping"}


def compose(overrides: Sequence[str], folder: Path = RECIPES_FOLDER) -> Recipe:
    """The recipe that these words describe; RecipeError lists everything that is wrong with them."""
    try:
        return _compose(overrides, folder)
    except RecipeError as error:
        raise RecipeError(_without_credentials(problem) for problem in error.problems) from error.__cause__


def _compose(overrides: Sequence[str], folder: Path) -> Recipe:
    if strangers := [word for word in overrides if not _WORD.match(word)]:
        raise RecipeError(f"{word}: sets nothing; write key=value, such as stage=2" for word in strangers)
    words = [forced for word in overrides for forced in _forced(word, folder)]
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
        try:
            config = hydra_compose(CONFIG_NAME, words, return_hydra_config=True)
        except MissingConfigException as error:
            raise RecipeError(_explain_missing(error, overrides)) from error
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            raise RecipeError(_explain_refusal(error, overrides)) from error
    return to_recipe(config, Origin(overrides, folder, _chosen_files(config, folder)))


@dataclass(frozen=True)
class Sweep:
    """What `--multirun` asks for."""

    combinations: list[list[str]]
    """Words of each, the last of those that vary varying fastest, as Hydra's own sweeper has them."""
    swept: list[str]
    """The keys that vary."""

    @property
    def names(self) -> list[str]:
        """Of each combination, the words that vary."""
        return [", ".join(word for word in words if word.partition("=")[0] in self.swept) for words in self.combinations]


def sweep(words: Sequence[str]) -> Sweep:
    """Every combination of words that name several values, `a=1,2` or `b=range(1,4)`; RecipeError where none does."""
    choices: list[list[str]] = []
    swept: list[str] = []
    for word in words:
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException as error:
            raise RecipeError(f"{word}: cannot be read; quote special characters, twice for the shell") from error
        if not override.is_sweep_override():
            choices.append([word])
            continue
        if not override.is_discrete_sweep():
            raise RecipeError(f"{word}: give values, such as {override.key_or_group}=1,2")
        key = override.get_key_element()
        swept.append(key)
        choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
    if not swept:
        raise RecipeError("--multirun: no word has several values; write one as stages.attention.learning_rate=1e-4,3e-4")
    return Sweep([list(combination) for combination in itertools.product(*choices)], swept)


@dataclass(frozen=True)
class Origin:
    """What a composed config was made from."""

    overrides: Sequence[str]
    folder: Path
    files: Sequence[tuple[Path, str]]
    """The YAML files that took part, each with the package it was put under ('' for the top level)."""

    def of(self, path: str, given: object) -> str:
        """Names the override or the files that a value came from; overrides win, as they do in Hydra."""
        keys = {override: override.lstrip("+~").split("=", 1)[0] for override in self.overrides}
        if whole := [override for override, key in keys.items() if f"{path}.".startswith(f"{key}.")]:
            return f" (set by the override {whole[-1]})"
        if parts := [override for override, key in keys.items() if key.startswith(f"{path}.")]:
            return f" (set by the override {' '.join(parts)})"
        found = [(file, _value_in(file, package, path)) for file, package in self.files]
        names = [
            str(file.relative_to(self.folder.parent))
            for file, value in found
            if isinstance(value, DictConfig) or (value is not None and value == given)
        ]
        return f" (set in {', '.join(names)})" if names else ""


def to_recipe(config: DictConfig, origin: Origin) -> Recipe:
    """Types a composed config; RecipeError lists everything that is wrong with it."""
    recipe = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    try:
        values = cast(dict[str, Any], OmegaConf.to_container(recipe, resolve=True, throw_on_missing=True))
    except MissingMandatoryValue as error:
        raise RecipeError(f"{error.full_key}: is required and not set") from error
    except OmegaConfBaseException as error:
        raise RecipeError(f"{error.full_key}: {str(error).splitlines()[0]}{origin.of(str(error.full_key), None)}") from error
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        by_path = groupby(_telling(error.errors()), key=lambda detail: recipe_path(detail["loc"]))
        raise RecipeError(_describe(path, list(details), values, origin) for path, details in by_path) from error


def _forced(word: str, folder: Path) -> list[str]:
    """`key=value` as `++key=value`: the schema knows which keys there are, the files only those that they set.

    A mapping with a `kind` is another thing than what was there, and not joined with it.
    """
    key, _, value = word.lstrip("+").partition("=")
    if (folder / key.partition("@")[0]).is_dir() or key.startswith(("~", "hydra.")):
        return [word]
    forced = f"++{word.lstrip('+')}"
    return [f"++{key}=null", forced] if _KIND.match(value) else [forced]


def _telling(details: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Leaves out, where a union was tried, the members that a value was plainly not meant for."""
    telling = [
        detail for detail in details if not (detail["type"] == "string_type" and isinstance(detail["input"], Mapping))
    ]
    return telling or list(details)


def _describe(path: str, details: Sequence[ErrorDetails], values: Mapping[str, Any], origin: Origin) -> str:
    """One problem; `details` has several entries where a union was tried."""
    detail = details[0]
    name, given, context = path.rsplit(".", 1)[-1], detail["input"], detail.get("ctx", {})
    source = origin.of(path, given)
    match detail["type"]:
        case "extra_forbidden":
            return f"{path}: no such key{_suggest(name, allowed_keys(detail['loc']))}{source}"
        case "missing":
            return f"{path}: is required and not set"
        case "union_tag_not_found":
            if not path.startswith("stages."):
                return f"{path}.kind: is required and not set"
            stages = [key for key in values["stages"] if key != name]
            return f"{path}: there is no such stage, and a new one needs its `kind`{_suggest(name, stages)}{source}"
        case "union_tag_invalid":
            tag = context["tag"]
            return f"{path}.kind: {tag!r} is none of {context['expected_tags']}{origin.of(f'{path}.kind', tag)}"
        case "value_error":
            return f"{path or 'recipe'}: {detail['msg'].removeprefix('Value error, ')}{source}"
        case "too_short":
            return f"{path}: is empty{source}"
        case _:
            return f"{path}: {_wanted(details)}, not {_short(given)}{source}"


def _wanted(details: Sequence[ErrorDetails]) -> str:
    """`input should be a valid integer or a list`, in the words of YAML."""
    first, *others = [
        f"input should be a {_PLAIN_TYPES[detail['type']]}"
        if detail["type"] in _PLAIN_TYPES
        else _lower_first(detail["msg"])
        for detail in details
    ]
    return " or ".join([first, *(other.removeprefix("input should be ") for other in others)])


def _value_in(file: Path, package: str, path: str) -> object:
    """What a file says at a recipe's path, None where it says nothing."""
    if package and not f"{path}.".startswith(f"{package}."):
        return None
    content = OmegaConf.load(file)
    inner = path[len(package) :].lstrip(".")
    return OmegaConf.select(content, inner, throw_on_resolution_failure=False) if inner else content


def _chosen_files(config: DictConfig, folder: Path) -> list[tuple[Path, str]]:
    """The YAML files that took part, each with its package ('' for the top level)."""
    files = [(folder / f"{CONFIG_NAME}.yaml", "")]
    for group, choice in config.hydra.runtime.choices.items():
        name, _, package = group.partition("@")
        file = folder / name / f"{choice}.yaml"
        if file.is_file():
            is_global = "@package _global_" in file.read_text(encoding="utf-8")
            files.append((file, "" if is_global else (package or name.replace("/", "."))))
    return files


def _explain_missing(error: MissingConfigException, overrides: Sequence[str]) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    options = error.options or []
    if not group or not options:
        return str(error)
    if group.startswith("budget/") and any(override.startswith("scale=") for override in overrides):
        group = "scale"
    return f"{group}: {choice!r} is none of {', '.join(options)}{_did_you_mean(choice, options)}"


def _explain_refusal(error: Exception, overrides: Sequence[str]) -> str:
    """A word or a file that Hydra cannot read."""
    if match := re.match(r"Ambiguous value for argument '\+*([^']+)'", str(error)):
        key, _, values = match[1].partition("=")
        return f"{match[1]}: a list is written {key}=[{values}], with quotes for the shell"
    if not isinstance(error, OverrideParseException):
        return str(error).replace("'++", "'")
    word = next(override for override in overrides if error.override.endswith(override.lstrip("+")))
    return f"{word}: cannot be read; quote special characters, twice for the shell: \"key='a=b'\""


def _suggest(given: str, options: Sequence[str]) -> str:
    return _did_you_mean(given, options) or (f"; choose from {', '.join(options)}" if options else "")


def _did_you_mean(given: str, options: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, options, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _without_credentials(text: str) -> str:
    """A URL may carry a password or a token, and a message ends in logs."""
    return _URL.sub(lambda match: f"{match[1]}…" if {"@", "?"} & set(match[0]) else match[0], text)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
