"""Prompt and output lengths: fixed, or drawn from quantiles of a measured distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MAX_ROUNDS = 1000


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
    """`count` draws of (prompt, output), and how many were drawn again because prompt + output exceeded `max_tokens`:
    what does not fit the model's context is left out, as serving benchmarks do.

    Prompts and outputs are independent, and each is stratified: one draw from each of `count` equal slices of its
    distribution, in random order. So samples of any size have nearly the same means, and points of a sweep that differ
    in their number of requests can be compared.
    """
    lengths: list[Lengths] = []
    redrawn = 0
    for _ in range(MAX_ROUNDS):
        missing = count - len(lengths)
        if not missing:
            return lengths, redrawn
        sides = [(rng.permutation(missing) + rng.random(missing)) / missing for _ in range(2)]
        pairs = [Lengths(prompt.at(u), output.at(v)) for u, v in zip(*sides, strict=True)]
        fitting = [pair for pair in pairs if sum(pair) <= max_tokens]
        redrawn += missing - len(fitting)
        lengths += fitting
    raise ValueError(f"hardly any drawn request fits a context of {max_tokens} tokens; use a model with more")


def mean_lengths(lengths: Sequence[Lengths]) -> tuple[float, float]:
    count = len(lengths)
    return sum(x.prompt_tokens for x in lengths) / count, sum(x.output_tokens for x in lengths) / count
