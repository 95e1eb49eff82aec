"""The table of a comparison, and its plot."""

from pathlib import Path

from orchestrator.report.comparison import Measured, Yardstick, table
from orchestrator.report.plots import plot_comparison

MEASURED = [
    Measured("full", 1000, 1000, 2.5, (2.0, 2.2), (900.0, 1100.0), 3_000_000, 2_000_000, {"plain": 0.004}, 0.004),
    Measured("lora", 50, 1050, 2.5, (2.1, 2.1), (2000.0,), 2_000_000, 3_000, {"adapted": 0.006, "merged": 0.004}, 0.004),
    Measured("prefix", 10, 1010, 2.5, (2.3,), (3000.0,), 2_000_000, 1_000, {"adapted": 0.005}, 0.004),
]


def test_means_and_spreads_of_each_method_under_the_base() -> None:
    _, _, base, full, lora, prefix = table(MEASURED).splitlines()
    assert base == "| the base |  | 2.500 |  |  |  | 4.0 |  |"
    assert full == "| full | 1,000 (100.00%) | 2.100 ± 0.141 | 1,000 | 3.0 MB | 2.0 MB | 4.0 |  |"
    assert lora == "| lora | 50 (4.76%) | 2.100 ± 0.000 | 2,000 | 2.0 MB | 3.0 kB | 6.0 | 4.0 |"
    assert prefix == "| prefix | 10 (0.99%) | 2.300 ± 0.000 | 3,000 | 2.0 MB | 1.0 kB | 5.0 | cannot be |"


def test_what_reaches_most_of_a_gain_with_the_fewest_parameters() -> None:
    *_, full, lora, prefix, _, verdict = table(MEASURED, Yardstick("full", 0.9)).splitlines()
    assert [row.split("|")[-2].strip() for row in (full, lora, prefix)] == ["100%", "100%", "50%"]
    assert verdict == "d90 = 50: lora is the smallest that reaches 90% of what full gains"
    assert "d50 = 10: prefix" in table(MEASURED, Yardstick("full", 0.5))
    assert "none reaches 90% of what full gains" in table([MEASURED[0], MEASURED[2]], Yardstick("full", 0.9))


def test_the_plot_is_the_same_for_the_same_figures(tmp_path: Path) -> None:
    for name in ("first.svg", "second.svg"):
        plot_comparison(MEASURED, tmp_path / name, Yardstick("full", 0.9))
    first, second = ((tmp_path / name).read_text(encoding="utf-8") for name in ("first.svg", "second.svg"))
    assert first == second
    assert first.count("<path") > 20
