"""Credentials in the URLs of a recipe, which goes into records and to wandb: what is secret comes from elsewhere."""

import re
from collections.abc import Iterator

from orchestrator.schema.recipe import Recipe

_CREDENTIALS = re.compile(
    r"""
    ://[^/?#@]*:(?!\d+/)[^@]*@       # user:password@, whose password may hold slashes; a port with a path is none
    | https?://[^/?#@]+@             # a token in the place of the user
    | ://\S*[?&][\w.-]*(token|secret|password|credential|signature|key|key_?id|sig)=
    """,
    re.VERBOSE | re.IGNORECASE,
)


def fields_with_credentials(recipe: Recipe) -> tuple[str, ...]:
    """The dotted paths of the values that hold a URL with a password, key or token in it."""
    return tuple(path for path, text in _texts("", recipe.model_dump(mode="json")) if _CREDENTIALS.search(text))


def _texts(path: str, value: object) -> Iterator[tuple[str, str]]:
    """Every text of a JSON value, with where it stands; the entries of a list stand where the list does."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(f"{path}.{key}" if path else key, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(path, inner)
