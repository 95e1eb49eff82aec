"""What of the recovery needs no cluster: being asked to stop, and the micro-batch after one that did not fit."""

import os
import signal

import pytest

from orchestrator.cluster.interrupts import SIGNALS, listening
from orchestrator.cluster.recovery import smaller_micro_batch


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_a_further_ctrl_c_is_not_waited_for(number: signal.Signals) -> None:
    with listening() as interrupts:
        assert not interrupts.is_asked()
        os.kill(os.getpid(), number)
        assert interrupts.is_asked()
        assert interrupts.signal is number
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.signal is number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.signal is number


def test_the_handlers_from_before_come_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]

    def fail_while_listening() -> None:
        with listening():
            assert [signal.getsignal(number) for number in SIGNALS] != before
            raise KeyError

    with pytest.raises(KeyError):
        fail_while_listening()
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(("size", "smaller"), [(8, 4), (4, 2), (2, 1), (6, 3), (9, 3), (15, 5), (7, 1), (1, 0)])
def test_a_smaller_micro_batch_makes_up_the_same_global_batch(size: int, smaller: int) -> None:
    assert smaller_micro_batch(size) == smaller
