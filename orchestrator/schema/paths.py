"""Where in a recipe a value stands: pydantic's locations as the user's own dotted paths."""

from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from orchestrator.schema.recipe import Recipe


def recipe_path(location: Sequence[int | str]) -> str:
    """`stages.attention.method.rank`, without the names of union members that pydantic puts inside."""
    return ".".join(str(part) for part, is_key in _walk(location) if is_key)


def allowed_keys(location: Sequence[int | str]) -> list[str]:
    """The keys that the schema declares beside the one at this location."""
    annotation: Any = Recipe
    for part in location[:-1]:
        annotation, _ = _descend(annotation, part)
    fields = [name for model in _models(annotation) for name in model.model_fields]
    return sorted(set(fields))


def _walk(location: Sequence[int | str]) -> Iterator[tuple[int | str, bool]]:
    annotation: Any = Recipe
    for part in location:
        annotation, is_key = _descend(annotation, part)
        yield part, is_key


def _descend(annotation: Any, part: int | str) -> tuple[Any, bool]:
    """The type below `part`, and whether `part` is a key the user typed (else it names a union's member)."""
    models = _models(annotation)
    for model in models:
        if part in model.model_fields and not _is_member(models, part):
            return model.model_fields[str(part)].annotation, True
    for candidate in _members(annotation):
        if get_origin(candidate) is dict:
            return get_args(candidate)[1], True
        if get_origin(candidate) is tuple and isinstance(part, int):
            return get_args(candidate)[0], True
    for model in models:
        # A model with a validator of its own is a member by the name function-after[_check(), RandomBase].
        if part in (model.__name__, _kind(model)) or str(part).endswith(f", {model.__name__}]"):
            return model, False
    is_type_name = isinstance(part, str) and (part in ("str", "int") or "[" in part)
    return Any, not is_type_name


def _is_member(models: Sequence[type[BaseModel]], part: int | str) -> bool:
    return len(models) > 1 and any(part == _kind(model) for model in models)


def _kind(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation)[0] if kind else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    return [part for part in _members(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]
