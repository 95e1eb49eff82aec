"""The parts of a step add up, and are counted anew for each."""

import time

import pytest
import torch

from orchestrator.engine.clock import StepClock
from orchestrator.engine.peak import peak_flops


def test_a_part_inside_another_counts_to_itself_alone() -> None:
    clock, started = StepClock(on_gpu=False), time.perf_counter()
    with clock.part("backward"):
        time.sleep(0.02)
        for _ in range(2):
            with clock.part("communication"):
                time.sleep(0.03)
    with clock.part("backward"):
        time.sleep(0.01)
    whole, seconds = time.perf_counter() - started, clock.read()
    assert seconds["communication"] >= 0.06
    assert 0.03 <= seconds["backward"] <= whole - seconds["communication"]
    assert sum(seconds.values()) <= whole


def test_a_part_that_is_forgotten_is_not_read() -> None:
    clock = StepClock(on_gpu=False)
    for name in ("checkpoint", "communication"):
        with clock.part(name):
            time.sleep(0.001)
    clock.forget("communication")
    clock.forget("forward")
    assert clock.read().keys() == {"checkpoint"}


def test_parts_are_added_up_by_name_and_counted_anew_after_a_reading() -> None:
    clock, started = StepClock(on_gpu=False), time.perf_counter()
    for name in ("forward", "backward", "forward"):
        with clock.part(name):
            time.sleep(0.02)
    seconds = clock.read()
    assert seconds.keys() == {"forward", "backward"}
    assert seconds["forward"] >= 0.04
    assert seconds["backward"] >= 0.02
    assert sum(seconds.values()) <= time.perf_counter() - started
    assert clock.read() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpus_parts_are_its_own_time_and_not_that_of_asking() -> None:
    clock, matrix = StepClock(on_gpu=True), torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)
    matrix @ matrix
    torch.cuda.synchronize()
    started = time.perf_counter()
    with clock.part("forward"):
        for _ in range(50):
            matrix @ matrix
    asking = time.perf_counter() - started
    torch.cuda.synchronize()
    assert clock.read()["forward"] > 2 * asking


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_peak_of_a_device_is_no_less_than_what_a_product_reaches(precision: str) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert 1e9 < peak_flops(precision) < 1e16
    finally:
        torch.set_num_threads(threads)
