"""Which stages `stage=` names."""

import pytest

from orchestrator.errors import RecipeError
from orchestrator.plan.selection import selected_stages
from orchestrator.schema import StageSelection

NAMES = ("vocabulary", "embeddings", "attention", "instruct", "export")
CHOICES = "choose from 0 vocabulary, 1 embeddings, 2 attention, 3 instruct, 4 export, a range (1-3), or all"


@pytest.mark.parametrize(
    ("selection", "selected"),
    [
        (2, ("attention",)),
        ("2", ("attention",)),
        ("attention", ("attention",)),
        ((1, 2), ("embeddings", "attention")),
        ((3, "embeddings", "1"), ("embeddings", "instruct")),
        ("1-3", ("embeddings", "attention", "instruct")),
        ("2 - 2", ("attention",)),
        (("0-1", 4), ("vocabulary", "embeddings", "export")),
        ("all", NAMES),
    ],
)
def test_a_selection_gives_names_in_the_recipes_order(selection: StageSelection, selected: tuple[str, ...]) -> None:
    assert selected_stages(selection, NAMES) == selected


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (5, f"stage: there is no stage 5; {CHOICES}"),
        ("3-7", f"stage: there is no stage 7; {CHOICES}"),
        ("atention", f"stage: there is no stage 'atention'; did you mean attention?; {CHOICES}"),
        ("zzz", f"stage: there is no stage 'zzz'; {CHOICES}"),
        (-1, f"stage: there is no stage '-1'; {CHOICES}"),
        ((1, "nothing"), f"stage: there is no stage 'nothing'; {CHOICES}"),
        ("3-1", "stage: the range 3-1 runs backwards; write 1-3"),
        ((), f"stage: selects nothing; {CHOICES}"),
    ],
)
def test_what_is_no_stage_is_named_with_the_choices(selection: StageSelection, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        selected_stages(selection, NAMES)
    assert str(caught.value) == message
