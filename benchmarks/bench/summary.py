"""Samples in a few numbers, and two sides' samples as a ratio with its spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Samples in a few numbers; percentiles are interpolated linearly."""

    count: int
    median: float
    p90: float
    p99: float
    lowest: float
    highest: float


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The quotient of two sides' medians, and the lowest and highest of one round."""

    value: float
    lowest: float
    highest: float


def summary(samples: Sequence[float]) -> Summary:
    """Return samples in a few numbers.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("no samples")
    median, p90, p99 = (float(value) for value in np.percentile(samples, [50, 90, 99]))
    return Summary(
        count=len(samples),
        median=median,
        p90=p90,
        p99=p99,
        lowest=min(samples),
        highest=max(samples),
    )


def median(samples: Sequence[float]) -> float:
    """Return the middle of the samples."""
    return summary(samples).median


def median_of_rounds(rounds: Sequence[Sequence[float]]) -> float:
    """Return the middle of the rounds' medians, each a list of samples."""
    return median([median(samples) for samples in rounds])


def ratio(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Ratio:
    """Return ours / theirs, each a list of samples a round, the rounds interleaved.

    The value is the quotient of the two sides' `median_of_rounds`; lowest and highest are quotients
    of the medians of one round.

    Raises:
        ValueError: not as many rounds on both sides, or none.
    """
    each = [median(a) / median(b) for a, b in zip(ours, theirs, strict=True)]
    value = median_of_rounds(ours) / median_of_rounds(theirs)
    return Ratio(value=value, lowest=min(each), highest=max(each))


def digits(value: float, count: int = 4) -> str:
    """Write a number with `count` significant digits, never as a power of ten."""
    if value == 0:
        return "0"
    places = max(0, count - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"
