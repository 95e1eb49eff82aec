"""Which stages `stage=` names."""

import difflib
import re
from collections.abc import Sequence

from orchestrator.errors import RecipeError
from orchestrator.schema import StageSelection

_RANGE = re.compile(r"(\d+)\s*-\s*(\d+)")


def selected_stages(selection: StageSelection, names: Sequence[str]) -> tuple[str, ...]:
    """The selected names in the recipe's order; RecipeError names what is not a stage, and lists the stages."""
    parts = selection if isinstance(selection, tuple) else (selection,)
    chosen = {name for part in parts for name in _names_of(part, names)}
    if not chosen:
        raise RecipeError(f"stage: selects nothing; {_choices(names)}")
    return tuple(name for name in names if name in chosen)


def _names_of(part: int | str, names: Sequence[str]) -> Sequence[str]:
    text = str(part).strip()
    if text == "all":
        return names
    if text in names:
        return (text,)
    if text.isdecimal():
        return (_numbered(int(text), names),)
    if match := _RANGE.fullmatch(text):
        first, last = (names.index(_numbered(int(number), names)) for number in match.groups())
        if first > last:
            raise RecipeError(f"stage: the range {text} runs backwards; write {last}-{first}")
        return names[first : last + 1]
    close = difflib.get_close_matches(text, names, n=1)
    raise RecipeError(
        f"stage: there is no stage {text!r}{f'; did you mean {close[0]}?' if close else ''}; {_choices(names)}"
    )


def _numbered(number: int, names: Sequence[str]) -> str:
    if number >= len(names):
        raise RecipeError(f"stage: there is no stage {number}; {_choices(names)}")
    return names[number]


def _choices(names: Sequence[str]) -> str:
    return "choose from " + ", ".join(f"{number} {name}" for number, name in enumerate(names)) + ", a range (1-3), or all"
