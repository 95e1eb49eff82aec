"""From YAML and words on a command line to a typed recipe. Hydra and OmegaConf are spoken here and nowhere above.

Every problem is reported at once, each with the recipe's own path, what was given, what would be right,
and the file or override that set it.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from orchestrator.errors import RecipeError
from orchestrator.schema import Recipe
from orchestrator.schema.paths import allowed_keys, recipe_path

RECIPES_FOLDER = Path(__file__).resolve().parents[1] / "recipes"
CONFIG_NAME = "config"


def compose(overrides: Sequence[str], folder: Path = RECIPES_FOLDER) -> Recipe:
    """The recipe that these words describe; RecipeError lists everything that is wrong with them."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
        try:
            config = hydra_compose(CONFIG_NAME, list(overrides), return_hydra_config=True)
        except MissingConfigException as error:
            raise RecipeError(_explain_missing(error, overrides)) from error
        except (HydraException, OmegaConfBaseException) as error:
            raise RecipeError(_explain_override(error, overrides)) from error
    return to_recipe(config, overrides, _chosen_files(config, folder))


def to_recipe(config: DictConfig, overrides: Sequence[str] = (), files: Mapping[Path, str] | None = None) -> Recipe:
    """Types a composed config; `files` maps each YAML file that took part to the package it was put under."""
    recipe = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    values = cast(dict[str, Any], OmegaConf.to_container(recipe, resolve=True))
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = [_describe(detail, overrides, files or {}) for detail in _telling(error.errors())]
        raise RecipeError(problems) from error


def _telling(details: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Leaves out, where a union was tried, the members that a value was plainly not meant for."""
    telling = [
        detail for detail in details if not (detail["type"] == "string_type" and isinstance(detail["input"], Mapping))
    ]
    return telling or list(details)


def _describe(detail: ErrorDetails, overrides: Sequence[str], files: Mapping[Path, str]) -> str:
    path = recipe_path(detail["loc"])
    source = _set_by(path, overrides, files)
    match detail["type"]:
        case "extra_forbidden":
            return f"{path}: no such key{_suggest(path.rsplit('.', 1)[-1], allowed_keys(detail['loc']))}{source}"
        case "missing":
            return f"{path}: is required and not set"
        case "union_tag_invalid":
            context = detail.get("ctx", {})
            return f"{path}.kind: {context.get('tag')!r} is none of {context.get('expected_tags')}{source}"
        case "value_error":
            return f"{path or 'recipe'}: {detail['msg'].removeprefix('Value error, ')}{source}"
        case _:
            return f"{path}: {_lower_first(detail['msg'])}, not {_short(detail['input'])}{source}"


def _set_by(path: str, overrides: Sequence[str], files: Mapping[Path, str]) -> str:
    """Names the override or the file that a value came from; overrides win, as they do in Hydra."""
    for override in reversed(overrides):
        key = override.lstrip("+~").split("=", 1)[0]
        if path == key or path.startswith(f"{key}.") or key.startswith(f"{path}."):
            return f" (set by the override {override})"
    for file, package in files.items():
        inner = path if not package else path.removeprefix(f"{package}.") if path.startswith(f"{package}.") else None
        if inner and OmegaConf.select(OmegaConf.load(file), inner) is not None:
            return f" (set in {file.parent.parent.name}/{file.parent.name}/{file.name})"
    return ""


def _chosen_files(config: DictConfig, folder: Path) -> dict[Path, str]:
    """The YAML files that took part, most specific last, each with its package ('' for the top level)."""
    files = {folder / f"{CONFIG_NAME}.yaml": ""}
    for group, choice in config.hydra.runtime.choices.items():
        name, _, package = group.partition("@")
        file = folder / name / f"{choice}.yaml"
        if file.is_file():
            is_global = "@package _global_" in file.read_text(encoding="utf-8")
            files[file] = "" if is_global else (package or name.replace("/", "."))
    return files


def _explain_missing(error: MissingConfigException, overrides: Sequence[str]) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    options = error.options or []
    if not group or not options:
        return str(error)
    if group.startswith("budget/") and any(override.startswith("scale=") for override in overrides):
        group = "scale"
    return f"{group}: there is no {choice!r}{_suggest(choice, options)}; choose from {', '.join(options)}"


def _explain_override(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra refuses a key that no file declares; says which word that was and what is nearest."""
    causes = [str(cause) for cause in (error, error.__cause__) if cause is not None]
    for override in overrides:
        key, separator, _ = override.lstrip("+~").partition("=")
        if separator and any(f"'{key}'" in cause for cause in causes):
            path = _unknown_part(key, causes)
            return (
                f"{path}: no such key{_suggest(path.rsplit('.', 1)[-1], _siblings(path))} (set by the override {override})"
            )
    return "\n".join(causes[:1])


def _unknown_part(key: str, causes: Sequence[str]) -> str:
    for cause in causes:
        if match := re.search(r"full_key: (\S+)", cause):
            return match[1]
    return key


def _siblings(path: str) -> list[str]:
    """The keys that the default recipe has where `path` was meant to be, and those its schema allows."""
    parent, _, _ = path.rpartition(".")
    node = OmegaConf.select(hydra_compose(CONFIG_NAME), parent) if parent else hydra_compose(CONFIG_NAME)
    present = [str(key) for key in node] if isinstance(node, DictConfig) else []
    kind = node.get("kind") if isinstance(node, DictConfig) else None
    parts = (*parent.split("."), kind, "?") if kind else (*parent.split("."), "?")
    return sorted({*present, *allowed_keys(tuple(part for part in parts if part))})


def _suggest(given: str, options: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, options, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
