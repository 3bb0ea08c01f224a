"""Statistics against numpy's and the standard library's own."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from sld_edge.benchmarks.bench.summary import digits, median_of_rounds, ratio, summary


@pytest.mark.parametrize("count", [1, 2, 7, 100, 333])
def test_percentiles_are_numpys(count: int) -> None:
    samples = list(np.random.default_rng(count).lognormal(size=count))
    found = summary(samples)
    expected = [float(np.quantile(samples, q)) for q in (0.5, 0.9, 0.99)]
    assert [found.median, found.p90, found.p99] == pytest.approx(expected, rel=1e-12)
    assert (found.count, found.lowest, found.highest) == (count, min(samples), max(samples))


def test_percentiles_are_the_standard_librarys() -> None:
    samples = list(np.random.default_rng(0).lognormal(size=60))
    cuts = statistics.quantiles(samples, n=100, method="inclusive")
    found = summary(samples)
    assert [found.median, found.p90, found.p99] == pytest.approx([cuts[49], cuts[89], cuts[98]])


def test_no_samples_have_no_summary() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summary([])


def test_a_ratio_is_the_quotient_of_medians_with_the_spread_of_rounds() -> None:
    found = ratio([[2.0, 9.0, 2.0], [3.0], [10.0]], [[4.0], [4.0, 4.0], [5.0]])
    assert found.value == 3.0 / 4.0  # of the rounds' 2, 3, 10 and 4, 4, 5
    assert (found.lowest, found.highest) == (0.5, 2.0)


def test_a_ratio_lies_within_its_spread() -> None:
    random = np.random.default_rng(1)
    for _ in range(200):
        sides = [
            [list(random.lognormal(size=random.integers(1, 5))) for _ in range(4)] for _ in "ab"
        ]
        found = ratio(*sides)
        assert found.lowest <= found.value <= found.highest
        assert found.value == median_of_rounds(sides[0]) / median_of_rounds(sides[1])


def test_rounds_that_are_missing_on_one_side_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio([[1.0], [1.0]], [[1.0]])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0012345, "0.001234"), (1.0, "1.000"), (43.21987, "43.22"), (123456.7, "123457"), (0, "0")],
)
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert digits(value) == text
