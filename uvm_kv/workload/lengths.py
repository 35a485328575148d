"""Prompt and output lengths: fixed, or drawn from quantiles of a measured distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MAX_REDRAWS = 1000


class Lengths(NamedTuple):
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Quantiles:
    """A distribution given by its quantiles, linear in between."""

    probabilities: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        p, v = self.probabilities, self.values
        if len(p) != len(v) or len(p) < 2 or p[0] != 0 or p[-1] != 1 or list(p) != sorted(set(p)):
            raise ValueError(f"quantile probabilities {list(p)} must rise from 0 to 1 and match {len(v)} values")
        if list(v) != sorted(v) or v[0] < 1:
            raise ValueError(f"quantile values {list(v)} must be token counts that do not fall")

    def at(self, u: float) -> int:
        return max(1, round(float(np.interp(u, self.probabilities, self.values))))

    @property
    def mean(self) -> float:
        return float(np.trapezoid(self.values, self.probabilities))


def draw_lengths(
    prompt: Quantiles, output: Quantiles, count: int, max_tokens: int, rng: np.random.Generator
) -> tuple[list[Lengths], int]:
    """`count` independent draws of (prompt, output), and how many were drawn again because prompt + output exceeded
    `max_tokens`: what does not fit the model's context is left out, as serving benchmarks do."""
    lengths: list[Lengths] = []
    redrawn = 0
    while len(lengths) < count:
        pair = Lengths(prompt.at(rng.random()), output.at(rng.random()))
        if sum(pair) <= max_tokens:
            lengths.append(pair)
            continue
        redrawn += 1
        if redrawn > MAX_REDRAWS * count:
            raise ValueError(f"hardly any drawn request fits a context of {max_tokens} tokens; use a model with more")
    return lengths, redrawn


def mean_lengths(lengths: Sequence[Lengths]) -> tuple[float, float]:
    count = len(lengths)
    return sum(x.prompt_tokens for x in lengths) / count, sum(x.output_tokens for x in lengths) / count
