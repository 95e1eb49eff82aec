"""What is said of a worker's memory before a run is what it holds then."""

from pathlib import Path

import pytest

from tests.bench.memory_forecast import CASES, compare

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.parametrize("name", ["LoRA on attention, ZeRO-2, 2 workers", "full fine-tuning, ZeRO-0, 1 worker"])
def test_a_forecast_is_near(name: str, tmp_path: Path) -> None:
    expected, held = compare(CASES[name], tmp_path)
    assert held > 1.5e9
    # Measured: 7 % and 1 % less. What the allocator of a CPU keeps of what was freed differs from run to run.
    assert expected == pytest.approx(held, rel=0.15)
