"""Medians, spreads and verdicts. A spread is relative: 1.4826 times the median absolute deviation, over the median."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

MET, NOT_MET, AMBIGUOUS, REPORTED = "met", "not met", "ambiguous", "reported"
"""The last: there is no target."""


class Summary(NamedTuple):
    median: float
    spread: float | None
    """None for a single value, which says nothing of its noise."""


def summary(values: Sequence[float]) -> Summary:
    if not values:
        raise ValueError("no values to take a median of")
    middle = median(values)
    if len(values) < 2 or middle == 0:
        return Summary(middle, None)
    return Summary(middle, 1.4826 * median(abs(value - middle) for value in values) / abs(middle))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Repeat by repeat, so that what slows both down for a while cancels."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} repeats over {len(theirs)}: the two sides are not from one run")
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def rates(num_bytes: float, seconds: Sequence[float]) -> list[float]:
    """Bytes per second of each repeat."""
    return [num_bytes / s for s in seconds]


def verdict(found: Summary, target: float | None) -> str:
    """Met or not only where the whole spread lies on one side of the target."""
    if target is None:
        return REPORTED
    if found.spread is None:
        return AMBIGUOUS
    reach = found.spread * abs(found.median)
    if found.median - reach >= target:
        return MET
    return NOT_MET if found.median + reach < target else AMBIGUOUS
