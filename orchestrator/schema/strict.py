"""The manner of every value in a recipe: frozen, and closed to keys it does not declare."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Schema(BaseModel):
    """A frozen value; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Sources = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
"""Files, folders, globs or hub ids; one may be written without the list."""
