"""So many steps in a row whose numbers went wrong end the training, and the message says where to look."""

import math
from dataclasses import replace

import pytest

from orchestrator.engine import StepResult
from orchestrator.errors import TrainingError
from orchestrator.train.bad_steps import BadStepCheck
from orchestrator.train.loop import Progress

GOOD = StepResult(loss=2.5, gradient_norm=0.5, learning_rate=3e-4, num_tokens=8, num_targets=8)
NAN = replace(GOOD, loss=math.nan, gradient_norm=math.nan)
BAD = {
    "a loss that is NaN": NAN,
    "an infinite loss": replace(GOOD, loss=math.inf),
    "an infinite gradient": replace(GOOD, gradient_norm=math.inf),
    "a gradient that is NaN": replace(GOOD, gradient_norm=math.nan),
    "a spent loss scale": replace(GOOD, gradient_norm=math.nan, skipped=True, scale_is_spent=True),
    "a loss that is NaN in a skipped step": replace(NAN, skipped=True),
}
SKIPPED = replace(GOOD, gradient_norm=math.nan, skipped=True)


def check(results: list[StepResult], most: int = 3, begin: int = 0) -> None:
    hook = BadStepCheck(most, lambda step: f"the samples of step {step} from 0")
    progress = Progress(begin)
    for result in results:
        progress = progress.after(result.num_tokens)
        hook.after_step(progress, result)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_so_many_in_a_row_end_the_training_and_one_less_does_not(bad: StepResult) -> None:
    check([GOOD, bad, bad])
    with pytest.raises(TrainingError):
        check([GOOD, bad, bad, bad])


def test_a_good_step_between_them_begins_the_count_anew() -> None:
    check([NAN, NAN, GOOD, NAN, NAN, GOOD])
    with pytest.raises(TrainingError, match="step 3: loss nan"):
        check([BAD["an infinite loss"], GOOD, NAN, NAN, NAN])


def test_what_goes_wrong_may_differ_from_step_to_step() -> None:
    with pytest.raises(TrainingError, match="step 1: loss nan"):
        check([NAN, BAD["an infinite loss"], BAD["a spent loss scale"]])


def test_steps_that_fp16_skips_do_not_count_while_its_scale_can_shrink() -> None:
    check([SKIPPED] * 20)


def test_the_message_names_the_first_step_its_samples_and_its_learning_rate() -> None:
    first = replace(NAN, learning_rate=7e-4)
    with pytest.raises(TrainingError) as raised:
        check([GOOD, first, NAN, NAN], begin=40)
    assert str(raised.value) == (
        "step 42: loss nan, gradient norm nan, and 2 more after it no better. It learned the samples of step 41 from 0. "
        "Look at these, or lower the learning rate (it was 0.0007); the newest checkpoint is from before it"
    )


def test_the_first_may_be_one_too_many() -> None:
    with pytest.raises(TrainingError, match=r"step 1: loss 2.5, gradient norm inf\. It learned the samples of step 0"):
        check([BAD["an infinite gradient"]], most=1)


def test_a_loss_scale_that_is_spent_is_named_as_such() -> None:
    with pytest.raises(TrainingError, match="step 1: the gradients overflow in fp16 at the smallest loss scale"):
        check([BAD["a spent loss scale"]], most=1)
