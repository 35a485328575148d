"""Random numbers of a run. They depend on (seed, repeat), and each purpose has its own stream."""

from __future__ import annotations

from enum import IntEnum


class Purpose(IntEnum):
    """The purpose that numbers are drawn for."""

    LENGTHS = 0
    ARRIVALS = 1
    TOKEN_IDS = 2
    STEADY_START = 3
    FURTHER_LENGTHS = 4
    SAMPLING = 5


def entropy(seed: int, repeat: int, purpose: Purpose, *more: int) -> list[int]:
    """Entropy for numpy's SeedSequence. `more`: further numbers that distinguish draws of one purpose. The repeat comes
    last, because numpy ignores a trailing 0: repeat 0 draws the same numbers as the seed alone."""
    return [seed, purpose.value, *more, repeat]
