"""Repeats of one point: median, bootstrap interval, and a comparison that may say AMBIGUOUS.

The interval is the percentile bootstrap of the median (Efron and Tibshirani, An Introduction to the Bootstrap, 1993),
with a fixed seed so that equal values give equal intervals. Fewer than MIN_REPEATS values have none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap

MIN_REPEATS = 3
CONFIDENCE = 0.95
RESAMPLES = 9999
_SEED = 0


class Interval(NamedTuple):
    """Median with its confidence interval; `low` and `high` are NaN where there are too few values."""

    median: float
    low: float
    high: float


class Ratio(NamedTuple):
    """`a` over `b`, each the median of its repeats, and what that says at a tolerance."""

    ratio: float
    low: float
    high: float
    word: str
    """HIGHER, LOWER, SAME, or AMBIGUOUS where the interval does not decide or there are too few repeats."""


def median_interval(values: Sequence[float]) -> Interval:
    """Median of repeats in fresh processes, and its interval. ValueError for no repeats."""
    sample = np.asarray(values, float)
    if sample.size == 0:
        raise ValueError("no values: a median needs at least one")
    median = float(np.median(sample))
    if sample.size < MIN_REPEATS:
        return Interval(median, float("nan"), float("nan"))
    if np.ptp(sample) == 0:
        return Interval(median, median, median)  # Nothing to resample; scipy would warn and say NaN.
    found = bootstrap(
        (sample,), np.median, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile", rng=_SEED
    ).confidence_interval
    return Interval(median, float(found.low), float(found.high))


def judge(a: Sequence[float], b: Sequence[float], tolerance: float, *, measured: bool) -> Ratio:
    """`compare` where the values are measured; of others, which have no noise of their own, by the medians alone."""
    if measured:
        return compare(a, b, tolerance)
    ratio = float(np.median(a) / np.median(b))
    word = "HIGHER" if ratio > 1 + tolerance else "LOWER" if ratio < 1 - tolerance else "SAME"
    return Ratio(ratio, math.nan, math.nan, word)  # The one NaN object: equal answers compare as equal.


def compare(a: Sequence[float], b: Sequence[float], tolerance: float) -> Ratio:
    """Whether `a` is higher than `b` by more than `tolerance` (a fraction), at CONFIDENCE; both positive.

    The interval is of the ratio of the medians, resampled on both sides. HIGHER or LOWER needs the whole interval
    beyond the tolerance, SAME the whole interval within it; everything else is AMBIGUOUS.
    """
    above, below = np.asarray(a, float), np.asarray(b, float)
    if not (above.size and below.size):
        raise ValueError(f"{above.size} and {below.size} values: a comparison needs at least one on each side")
    if min(above.min(), below.min()) <= 0:
        raise ValueError("a comparison is of positive values: rates, times or bytes")
    ratio = float(np.median(above) / np.median(below))
    if min(above.size, below.size) < MIN_REPEATS:
        return Ratio(ratio, float("nan"), float("nan"), "AMBIGUOUS")
    rng = np.random.default_rng(_SEED)
    sides = [np.median(rng.choice(side, (RESAMPLES, side.size)), axis=1) for side in (above, below)]
    low, high = np.quantile(sides[0] / sides[1], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    if low > 1 + tolerance:
        word = "HIGHER"
    elif high < 1 - tolerance:
        word = "LOWER"
    else:
        word = "SAME" if low >= 1 - tolerance and high <= 1 + tolerance else "AMBIGUOUS"
    return Ratio(ratio, float(low), float(high), word)
