"""Random numbers of a run: those of (seed, repeat), and for each purpose its own."""

from __future__ import annotations

from enum import IntEnum


class Purpose(IntEnum):
    """What numbers are drawn for."""

    LENGTHS = 0
    ARRIVALS = 1
    TOKEN_IDS = 2
    STEADY_START = 3
    FURTHER_LENGTHS = 4
    SAMPLING = 5


def entropy(seed: int, repeat: int, purpose: Purpose, *more: int) -> list[int]:
    """What numpy's SeedSequence is given. `more`: what else tells draws of one purpose apart. The repeat comes last:
    numpy takes a 0 there for nothing, so that repeat 0 is what the seed alone draws."""
    return [seed, purpose.value, *more, repeat]
