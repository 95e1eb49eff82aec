"""The manner of every value in a recipe: frozen, and closed to keys it does not declare."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveFloat


class Schema(BaseModel):
    """A frozen value; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str | dict) else value


Sources = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
"""Files, folders, globs or hub ids; one may be written without the list."""


class WeightedSource(Schema):
    """A source that is learned more or less often than the others."""

    path: str
    weight: PositiveFloat
    """How often each document is learned in a pass over the data: 2 is twice, 0.1 a tenth of the documents once."""


WeightedSources = Annotated[tuple[str | WeightedSource, ...], BeforeValidator(_as_tuple)]
"""The same with weights; a source without one counts once."""
