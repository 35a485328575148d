"""Median, bootstrap interval and comparison of repeats."""

from __future__ import annotations

import math

import numpy as np
import pytest

from uvm_kv.report.statistics import compare, median_interval


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    found = [median_interval(list(rng.normal(100, 5, 15))) for _ in range(120)]
    covered = np.mean([low <= 100 <= high for _, low, high in found])
    assert 0.88 <= covered <= 1.0
    assert all(low <= median <= high for median, low, high in found)


def test_few_repeats_have_no_interval_and_equal_ones_no_width() -> None:
    median, low, high = median_interval([3.0, 5.0])
    assert median == 4.0 and math.isnan(low) and math.isnan(high)
    assert median_interval([2.0] * 5) == (2.0, 2.0, 2.0)
    assert median_interval([1, 2, 3, 9]) == median_interval([1, 2, 3, 9])
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        ([110, 111, 109, 110, 112], [100, 101, 99, 100, 100], "HIGHER"),
        ([100, 101, 99, 100, 100], [110, 111, 109, 110, 112], "LOWER"),
        ([100, 100.2, 99.9, 100, 100.1], [100, 100.1, 99.8, 100.2, 100], "SAME"),
        ([100, 90, 110, 95, 107], [100, 101, 99, 100, 100], "AMBIGUOUS"),
        ([150], [100], "AMBIGUOUS"),
    ],
)  # fmt: skip
def test_a_comparison_decides_only_what_the_repeats_decide(a: list[float], b: list[float], word: str) -> None:
    ratio = compare(a, b, 0.01)
    assert ratio.word == word
    assert ratio.ratio == pytest.approx(np.median(a) / np.median(b))
    assert math.isnan(ratio.low) or ratio.low <= ratio.ratio <= ratio.high


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="at least one on each side"):
        compare([], [1.0], 0.01)
    with pytest.raises(ValueError, match="positive"):
        compare([0.0], [1.0], 0.01)
