"""Which nodes a selector of labels wants."""

import pytest

from orchestrator.cluster.capacity import is_selected

LABELS = {"pool": "new", "zone": "a"}


@pytest.mark.parametrize(
    "selector",
    [{}, {"pool": "new"}, {"pool": "!old"}, {"pool": "in(old, new)"}, {"pool": "!in(old,older)"}, {"rack": "!1"}],
    ids=str,
)
def test_a_node_is_wanted(selector: dict[str, str]) -> None:
    assert is_selected(LABELS, selector)


@pytest.mark.parametrize(
    "selector",
    [
        {"pool": "old"},
        {"pool": "!new"},
        {"pool": "in(old,older)"},
        {"pool": "!in(new)"},
        {"rack": "1"},
        {"pool": "new", "zone": "b"},
    ],
    ids=str,
)
def test_a_node_is_not_wanted(selector: dict[str, str]) -> None:
    assert not is_selected(LABELS, selector)
