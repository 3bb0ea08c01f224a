"""Each number against an oracle not written here: scipy, exact enumeration, or brute force."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]  # ships none

from sld_edge.benchmarks.evaluation.statistics import (
    difference_estimate,
    expected_maximum,
    mcnemar,
    mean_estimate,
    pareto_front,
    wilson,
)

I2P = Path(__file__).parents[3] / "shared" / "data" / "i2p.csv"


def test_wilson_is_scipys() -> None:
    for hits, total in ((81, 263), (15, 148), (0, 20), (20, 20), (1, 3)):
        theirs = stats.binomtest(hits, total).proportion_ci(method="wilson")
        assert wilson(hits, total) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    with pytest.raises(ValueError, match="no cases"):
        wilson(0, 0)


def test_a_mean_over_prompts_is_scipys_percentile_bootstrap() -> None:
    rng = np.random.default_rng(1)
    prompts = np.repeat(np.arange(40), 5)
    chance = rng.random(40)[prompts]
    values = rng.random(200) < chance
    ours = mean_estimate(values, prompts, resamples=20_000)
    by_prompt = values.reshape(40, 5).mean(axis=1)
    theirs = stats.bootstrap(
        (by_prompt,), np.mean, n_resamples=20_000, method="percentile", rng=rng
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)
    # as if every picture were a prompt of its own: too sure, and so not what is reported
    naive = mean_estimate(values, np.arange(200), resamples=20_000)
    assert ours.high - ours.low > 1.3 * (naive.high - naive.low)


def test_prompts_with_more_pictures_weigh_more_in_mean_and_interval() -> None:
    values, prompts = [1, 1, 1, 1, 0, 0.5], [7, 7, 7, 7, 3, 9]
    sums, sizes = {7: 4.0, 3: 0.0, 9: 0.5}, {7: 4, 3: 1, 9: 1}
    exact = [
        sum(sums[p] for p in drawn) / sum(sizes[p] for p in drawn)
        for drawn in itertools.product((3, 7, 9), repeat=3)
    ]
    got = mean_estimate(values, prompts, resamples=20_000)
    assert got.value == pytest.approx(4.5 / 6)
    # the quantiles of the 27 possible resamples: 1 in 27 is all 3s, 1 in 27 all 7s
    assert (got.low, got.high) == (min(exact), max(exact))


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        prompts = np.repeat(np.arange(60), 3)
        values = rng.random(180) < rng.beta(2, 3, 60)[prompts]  # the true mean is 0.4
        got = mean_estimate(values, prompts, resamples=400)
        held += got.low <= 0.4 <= got.high
    assert 0.90 <= held / 300 <= 0.985


def test_resampling_is_seeded_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, prompts = np.arange(50) % 3, np.arange(50) // 2
    first = mean_estimate(values, prompts)
    assert first == mean_estimate(values, prompts)
    assert first != mean_estimate(values, prompts, seed=1)
    monkeypatch.setattr("sld_edge.benchmarks.evaluation.statistics._BLOCK", 1000)
    assert mean_estimate(values, prompts) == first


@pytest.mark.parametrize("flag", [0, 1])
def test_none_or_all_flagged_still_leaves_doubt(flag: int) -> None:
    got = mean_estimate([bool(flag)] * 40, np.arange(40) // 2)  # 20 prompts
    assert (got.low, got.high) == pytest.approx(wilson(20 * flag, 20))
    assert got.high - got.low > 0.1
    same = mean_estimate([float(flag)] * 40, np.arange(40) // 2)  # a number, not a share
    assert (same.low, same.high) == (flag, flag)


def test_of_one_prompt_the_pictures_are_resampled() -> None:
    alone, each = mean_estimate([1, 0, 0, 0], [5] * 4), mean_estimate([1, 0, 0, 0], range(4))
    assert alone == each
    assert alone.low == 0
    assert alone.high >= 0.5


def test_no_values_have_no_mean() -> None:
    with pytest.raises(ValueError, match="no values"):
        mean_estimate([], [])


def test_a_difference_is_that_of_the_pairs() -> None:
    rng = np.random.default_rng(3)
    prompts = np.repeat(np.arange(50), 4)
    theirs = rng.random(200) < 0.6
    ours = theirs & (rng.random(200) < 0.5)
    got = difference_estimate(ours, theirs, prompts)
    assert got.value == pytest.approx(ours.mean() - theirs.mean())
    assert got.low < got.value < got.high < 0
    unpaired = mean_estimate(ours, prompts).high - mean_estimate(theirs, prompts).low
    assert got.high < unpaired  # pairs know more than two intervals
    same = difference_estimate(theirs, theirs, prompts)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def exact_maximum(percentages: list[float], size: int) -> tuple[float, float]:
    """Mean and deviation of the maximum, over all subsets at once: the k-th smallest of N is it in
    C(k - 1, size - 1) of C(N, size) subsets."""
    ways = [math.comb(k, size - 1) for k in range(len(percentages))]
    chance = np.array([way / math.comb(len(percentages), size) for way in ways])
    values = np.sort(percentages)
    mean = float(chance @ values)
    return mean, math.sqrt(float(chance @ (values - mean) ** 2))


@pytest.mark.parametrize(("count", "size"), [(30, 25), (200, 25), (12, 3)])
def test_the_expected_maximum_is_that_of_all_subsets(count: int, size: int) -> None:
    values = np.random.default_rng(count).random(count) ** 3 * 100
    got = expected_maximum(values, size=size, draws=100_000)
    mean, deviation = exact_maximum(list(values), size)
    assert got.mean == pytest.approx(mean, abs=5 * deviation / math.sqrt(100_000))
    assert got.deviation == pytest.approx(deviation, rel=0.03)


def test_few_prompts_are_all_drawn() -> None:
    got = expected_maximum([10, 80, 30])
    assert (got.mean, got.deviation) == (80, 0)
    with pytest.raises(ValueError, match="no prompts"):
        expected_maximum([])


@pytest.mark.skipif(not I2P.exists(), reason="needs shared/data/i2p.csv")
def test_i2ps_own_column_gives_the_measured_expected_maximum() -> None:
    percentages: dict[str, float] = {}
    with I2P.open(newline="") as stream:
        for row in csv.DictReader(stream):  # of a prompt that comes again, the first row
            percentages.setdefault(row["prompt"], float(row["inappropriate_percentage"]))
    assert len(percentages) == 4467
    got = expected_maximum(list(percentages.values()))
    # 10,000 draws of deviation 5.8: a standard error of 0.06 on the mean, of about 0.1 on the
    # deviation, twice, for 97.18 +- 5.79 was drawn too
    assert got.mean == pytest.approx(97.18, abs=0.25)
    assert got.deviation == pytest.approx(5.79, abs=0.4)
    mean, deviation = exact_maximum(list(percentages.values()), 25)  # 97.10 +- 5.94
    assert got.mean == pytest.approx(mean, abs=0.2)
    assert got.deviation == pytest.approx(deviation, abs=0.3)


@pytest.mark.parametrize(
    ("gained", "lost", "both"),
    [(0, 6, 3), (2, 9, 0), (5, 5, 1), (1, 0, 9), (40, 61, 5), (900, 1100, 0), (0, 3000, 1)],
)
def test_mcnemar_is_scipys_binomial_test(gained: int, lost: int, both: int) -> None:
    ours = [1] * gained + [0] * lost + [1] * both + [0] * 4
    theirs = [0] * gained + [1] * lost + [1] * both + [0] * 4
    expected = stats.binomtest(gained, gained + lost, 0.5).pvalue
    assert mcnemar(ours, theirs) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(theirs, ours) == mcnemar(ours, theirs)


def test_mcnemar_without_a_pair_that_differs_is_1() -> None:
    assert mcnemar([True, False], [True, False]) == 1.0


def test_the_front_is_what_no_point_beats() -> None:
    rng = np.random.default_rng(5)
    costs, gains = rng.integers(0, 12, 60), rng.integers(0, 12, 60)
    points = list(zip(costs, gains, strict=True))
    expected = [
        not any((c <= x and g >= y) and (c < x or g > y) for c, g in points) for x, y in points
    ]
    assert pareto_front(costs, gains).tolist() == expected
    assert 0 < sum(expected) < 60
    assert pareto_front([1, 1], [2, 2]).tolist() == [True, True]
