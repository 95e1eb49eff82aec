"""The manner of every value in a recipe: frozen, and closed to keys it does not declare."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, PositiveFloat, Tag


class Schema(BaseModel):
    """A frozen value; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def _as_tuple(value: object) -> object:
    if value is None:
        return ()
    return (value,) if isinstance(value, str | dict) else value


Sources = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
"""Files, folders, globs or hub ids; one may be written without the list, and null is none."""


class WeightedSource(Schema):
    """A source that is learned more or less often than the others."""

    path: str
    weight: PositiveFloat
    """How often each document is learned in a pass over the data: 2 is twice, 0.1 a tenth of the documents once."""


def mapping_or(tag: str, other: str) -> Discriminator:
    """Tells a mapping from all else, so that an error speaks of what was meant alone."""
    return Discriminator(lambda value: tag if isinstance(value, dict | Schema) else other)


_PlainOrWeighted = Annotated[
    Annotated[str, Tag("str")] | Annotated[WeightedSource, Tag("WeightedSource")], mapping_or("WeightedSource", "str")
]
WeightedSources = Annotated[tuple[_PlainOrWeighted, ...], BeforeValidator(_as_tuple)]
"""The same with weights; a source without one counts once."""
