"""What a step's numbers mean."""

import math

import pytest

from orchestrator.engine import StepResult

GOOD = {"loss": 2.0, "gradient_norm": 1.0}
INFINITE, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("changes", "is_bad"),
    [
        ({}, False),
        ({"loss": NAN}, True),
        ({"loss": -INFINITE}, True),
        ({"gradient_norm": NAN}, True),
        ({"gradient_norm": INFINITE}, True),
        ({"gradient_norm": INFINITE, "skipped": True}, False),
        ({"gradient_norm": NAN, "skipped": True, "scale_is_spent": True}, True),
        ({"loss": NAN, "skipped": True}, True),
    ],
)
def test_a_bad_step_is_one_that_no_smaller_loss_scale_would_help(changes, is_bad):
    result = StepResult(learning_rate=1e-3, num_tokens=8, num_targets=8, **(GOOD | changes))
    assert result.is_bad == is_bad
