"""Two-level factorial designs without replicates: effects, and which of them stand out.

Effects are of the logarithm of throughput, so that they multiply: a main effect is the mean of the runs at a factor's
high level less that at its low one, an interaction of A and B half of what B's high level adds to A's effect less what
its low level does (Box, Hunter and Hunter, Statistics for Experimenters, 2005, chapters 5 and 6). A deterministic
simulator has no replicate noise, so that an effect is judged by whether it stands out from the others: beyond the
margin of error of Lenth's pseudo standard error ("Quick and Easy Analysis of Unreplicated Factorials",
Technometrics 31, 1989) and beyond that of what main effects and two-way interactions leave unexplained. Repeats of a
combination count by their median; of measured ones two combinations are compared by their repeats (`judge`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t as student_t

from uvm_kv.report.repeats import REPEATS
from uvm_kv.report.statistics import CONFIDENCE, Ratio, judge
from uvm_kv.report.verdict import MEASURED


@dataclass(frozen=True)
class Factor:
    name: str
    low: Any
    high: Any

    def level(self, coded: float) -> str:
        """The level, in words, that -1 or +1 stands for."""
        value = self.high if coded > 0 else self.low
        return ("yes" if value else "no") if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Design:
    """N combinations of an orthogonal two-level design, in factors that each take both levels equally often."""

    factors: tuple[Factor, ...]
    coded: NDArray[np.float64]
    """N x factors, -1 and +1."""
    log_rate: NDArray[np.float64]
    """[N], the logarithm of the median of each combination's repeats."""
    rates: tuple[tuple[float, ...], ...]
    """The repeats themselves, tokens per second."""
    measured: bool

    @property
    def num_runs(self) -> int:
        return sum(len(repeats) for repeats in self.rates)

    @property
    def spread(self) -> float:
        """The sum of squares of log_rate around its mean."""
        return float(((self.log_rate - self.log_rate.mean()) ** 2).sum())

    def name(self, members: tuple[int, ...]) -> str:
        return " x ".join(self.factors[i].name for i in members)

    def effects(self) -> dict[tuple[int, ...], float]:
        """Main effects and two-way interactions by their factors; each the same number that least squares gives, as
        the columns of the model are orthogonal."""
        half = len(self.log_rate) / 2
        return {members: float(column @ self.log_rate / half) for members, column in _terms(self.coded).items()}

    def ratios(self, i: int, tolerance: float) -> list[Ratio]:
        """High over low of one factor, at every combination of the others that was run at both."""
        rest = [tuple(row) for row in np.delete(self.coded, i, axis=1)]
        rates = {(row, x): y for row, x, y in zip(rest, self.coded[:, i], self.rates, strict=True)}
        return [
            judge(rates[row, 1.0], rates[row, -1.0], tolerance, measured=self.measured)
            for row in dict.fromkeys(rest)
            if {(row, 1.0), (row, -1.0)} <= rates.keys()
        ]


def _terms(coded: NDArray[np.float64]) -> dict[tuple[int, ...], NDArray[np.float64]]:
    """The columns of main effects and two-way interactions, [N] each, by their factors."""
    orders = (combinations(range(coded.shape[1]), order) for order in (1, 2))
    return {members: coded[:, list(members)].prod(axis=1) for found in orders for members in found}


def two_level_design(runs: pd.DataFrame, names: list[str], study: str) -> Design:
    """The design of a row per combination: the levels of its factors `names`, with `rate` and its repeats, in tokens
    per second. ValueError where that is no balanced two-level design."""
    factors = []
    for name in names:
        found = sorted(runs[name].unique().tolist(), key=lambda value: (value != "none", value))
        if len(found) > 2:
            raise ValueError(f"{study}: {name} takes {len(found)} values ({found}); a two-level design has two of each")
        factors += [Factor(name, *found)] if len(found) == 2 else []
    if len(factors) < 2:
        raise ValueError(f"{study}: fewer than two factors vary; there is nothing to tell apart")
    coded = np.column_stack([np.where(runs[f.name] == f.high, 1.0, -1.0) for f in factors])
    model = np.column_stack([np.ones(len(coded)), *_terms(coded).values()])
    if not np.allclose(model.T @ model, len(coded) * np.eye(model.shape[1])):
        raise ValueError(
            f"{study}: {len(coded)} runs are not a balanced half or whole of the {2 ** len(factors)} combinations of "
            f"{', '.join(f.name for f in factors)}; run what is missing"
        )
    order = np.lexsort(coded.T[::-1])  # The same sums, whatever the order of the runs.
    rates = tuple(runs[f"rate{REPEATS}"].iloc[i] for i in order)
    log_rate = np.log(runs["rate"].to_numpy(float))[order]
    return Design(tuple(factors), coded[order], log_rate, rates, bool((runs["origin"] == MEASURED).all()))


def lenth(effects: NDArray[np.float64]) -> tuple[float, float]:
    """(pseudo standard error, margin of error at CONFIDENCE) of the contrasts of an unreplicated design."""
    size = np.abs(effects)
    first = 1.5 * float(np.median(size))
    pse = 1.5 * float(np.median(size[size <= 2.5 * first]))
    return pse, _quantile(len(size) / 3) * pse


def remainder(design: Design) -> tuple[float, float]:
    """(root mean square, margin of error at CONFIDENCE) of the contrasts of three factors and more: the spread of the
    runs beyond main effects and two-way interactions. (0, 0) where the design has no more contrasts."""
    found, num = np.array([*design.effects().values()]), len(design.log_rate)
    degrees = num - 1 - len(found)
    if degrees == 0:
        return 0.0, 0.0
    rms = float(np.sqrt(max(0.0, 4 * design.spread / num - (found**2).sum()) / degrees))
    return rms, _quantile(degrees) * rms


def _quantile(degrees: float) -> float:
    return float(student_t.ppf(0.5 + CONFIDENCE / 2, degrees))


def effects_table(design: Design) -> pd.DataFrame:
    """A row per effect, by size."""
    found = design.effects()
    margin = max(lenth(np.array([*found.values()]))[1], remainder(design)[1])
    rows = [
        {
            "effect": design.name(members),
            "order": len(members),
            "low": design.factors[members[0]].level(-1) if len(members) == 1 else "",
            "high": design.factors[members[0]].level(1) if len(members) == 1 else "",
            "log_effect": effect,
            "times": float(np.exp(effect)),
            "stands_out": abs(effect) > margin,
            "margin_times": float(np.exp(margin)),
            "share_of_variance": len(design.log_rate) * effect**2 / 4 / design.spread if design.spread else 0.0,
        }
        for members, effect in found.items()
    ]
    table = pd.DataFrame(rows).sort_values("log_effect", key=abs, ascending=False, kind="stable")
    return table.reset_index(drop=True)


def means(design: Design, pair: str) -> list[dict[str, Any]]:
    """Geometric mean throughput at the four combinations of the levels of two factors."""
    i, j = next(members for members in combinations(range(len(design.factors)), 2) if design.name(members) == pair)
    rows = []
    for x, y in product((-1, 1), repeat=2):
        mean = float(np.exp(design.log_rate[(design.coded[:, i] == x) & (design.coded[:, j] == y)].mean()))
        levels = {"first_level": design.factors[i].level(x), "second_level": design.factors[j].level(y)}
        rows.append({"effect": pair, "order": 2, "tokens_per_s": mean} | levels)
    return rows
