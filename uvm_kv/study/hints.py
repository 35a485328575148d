"""Hints, prefetch distance, layout and block size on managed memory: a two-level design, main effects, interactions.

Effects are of the logarithm of throughput, so that they multiply: a main effect is the mean of the runs at a factor's
high level less that at its low one, an interaction of A and B half of what B's high level adds to A's effect less what
its low level does (Box, Hunter and Hunter, Statistics for Experimenters, 2005, chapters 5 and 6). A deterministic
simulator has no replicate noise, so that an effect is judged by whether it stands out from the others: beyond the
margin of error of Lenth's pseudo standard error ("Quick and Easy Analysis of Unreplicated Factorials",
Technometrics 31, 1989) and beyond that of what main effects and two-way interactions leave unexplained. Repeats of a
combination count by their median; of measured ones two combinations are compared by their repeats (`judge`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray
from scipy.stats import t as student_t

from uvm_kv.report.repeats import REPEATS, medians, one_of_each
from uvm_kv.report.statistics import MIN_REPEATS, Ratio, judge
from uvm_kv.report.style import PAGE_IN, SPARE
from uvm_kv.report.verdict import MEASURED
from uvm_kv.study.base import Drawn, Study
from uvm_kv.study.kit import inserted, served, throughput

LAYERS_AHEAD = "layers ahead"
HINT_COLUMNS = ("preferred_location", "accessed_by", "read_mostly", "discard_on_free")
HINTS = tuple(name.replace("_", " ") for name in HINT_COLUMNS)
CONFIDENCE = 0.95
MIN_CHANGE = 0.01
"""A hint that moves throughput by less is said to do nothing in that combination."""
NUM_BARS = 14
NUM_PAIRS = 2
COLUMNS = (
    "runs",
    "num_runs",
    "drawn_in",
    "effect",
    "order",
    "low",
    "high",
    "log_effect",
    "times",
    "stands_out",
    "margin_times",
    "share_of_variance",
    "first_level",
    "second_level",
    "tokens_per_s",
)
BARS, MEANS = "bars", "means"
"""Of an effect, or of one of the four means behind an interaction, with the levels of its two factors."""


@dataclass(frozen=True)
class Factor:
    name: str
    low: Any
    high: Any

    def level(self, coded: int) -> str:
        value = self.high if coded > 0 else self.low
        return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Design:
    """N runs of an orthogonal two-level design, in factors that each take both levels equally often."""

    factors: tuple[Factor, ...]
    coded: NDArray[np.float64]
    """N x factors, -1 and +1."""
    log_rate: NDArray[np.float64]
    """Of the median of each combination's repeats."""
    rates: tuple[tuple[float, ...], ...]
    """The repeats themselves, tokens per second."""
    measured: bool

    @property
    def num_runs(self) -> int:
        return sum(len(repeats) for repeats in self.rates)

    def effect(self, members: Sequence[int]) -> float:
        contrast = self.coded[:, list(members)].prod(axis=1)
        return float(2 * contrast @ self.log_rate / len(contrast))

    def effects(self, order: int) -> dict[tuple[int, ...], float]:
        return {members: self.effect(members) for members in combinations(range(len(self.factors)), order)}


def _levels(runs: pd.DataFrame) -> pd.DataFrame:
    variant = runs["variant"]
    ahead = variant.map(lambda v: v["placement.num_layers_ahead"]).where(runs["placement"] == "prefetch_ahead", 0)
    return pd.DataFrame(
        {
            HINTS[0]: runs["hints.preferred_location"],
            HINTS[1]: runs["hints.accessed_by"].astype(bool),
            HINTS[2]: runs["hints.read_mostly"].astype(bool),
            HINTS[3]: runs["hints.discard_on_free"].astype(bool),
            LAYERS_AHEAD: ahead.astype(int),
            "layout": runs["layout"],
            "block size": runs["block_size"].astype(int),
        }
    )


def _ordered(values: Sequence[Any]) -> list[Any]:
    """Low level first: `none` and the smaller of numbers."""
    return sorted(values, key=lambda v: (v != "none", v))


def design_of_runs(runs: pd.DataFrame) -> dict[str, Design]:
    """One design of all runs, or one of demand paging, with the layout as a factor, and one of prefetching ahead, which
    has no block_major, with its distance. ValueError, with what is at fault, where one is no two-level design."""
    if "hints.preferred_location" not in runs or set(runs["memory"]) != {"managed"}:
        raise ValueError("hints: only runs of memory=managed have hints")
    one_of_each(runs, ("model", "hardware", "origin"), "hints")
    levels = _levels(runs)
    names = [str(name) for name in levels]
    rated = runs.drop(columns="layout").assign(rate=throughput(runs))
    try:
        found = medians(pd.concat([rated, levels], axis=1), names, keep=["rate"])
    except ValueError as error:
        raise ValueError(f"hints: {error}") from None
    ahead = found[LAYERS_AHEAD] > 0
    if ahead.all() or not ahead.any():
        return {"": _design(found, names)}
    parts = {"demand paging": ~ahead, "prefetching ahead": ahead}
    return {name: _design(found[mask], names) for name, mask in parts.items()}


def _design(runs: pd.DataFrame, names: Sequence[str]) -> Design:
    """Of a row a combination."""
    levels, factors = runs[list(names)], []
    for name in levels:
        found = _ordered(levels[name].unique().tolist())
        if len(found) > 2:
            raise ValueError(f"hints: {name} takes {len(found)} values ({found}); a two-level design has two of each")
        if len(found) == 2:
            factors.append(Factor(str(name), *found))
    if len(factors) < 2:
        raise ValueError("hints: fewer than two factors vary; there is nothing to tell apart")
    coded = np.column_stack([np.where(levels[f.name] == f.high, 1.0, -1.0) for f in factors])
    terms = [coded[:, list(m)].prod(axis=1) for n in (1, 2) for m in combinations(range(len(factors)), n)]
    model = np.column_stack([np.ones(len(coded)), *terms])
    if not np.allclose(model.T @ model, len(coded) * np.eye(model.shape[1])):
        full = 2 ** len(factors)
        raise ValueError(
            f"hints: {len(coded)} runs are not a balanced half or whole of the {full} combinations of "
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
    """(root mean square, margin of error at CONFIDENCE) of the contrasts of three factors and more: what is left of the
    runs' spread beyond main effects and two-way interactions. (0, 0) where the design has no more contrasts."""
    found = np.array([*design.effects(1).values(), *design.effects(2).values()])
    num = len(design.log_rate)
    degrees = num - 1 - len(found)
    if degrees == 0:
        return 0.0, 0.0
    spread = float(((design.log_rate - design.log_rate.mean()) ** 2).sum())
    rms = float(np.sqrt(max(0.0, 4 * spread / num - (found**2).sum()) / degrees))
    return rms, _quantile(degrees) * rms


def _quantile(degrees: float) -> float:
    return float(student_t.ppf(0.5 + CONFIDENCE / 2, degrees))


def draw(runs: pd.DataFrame, failures: Sequence[dict[str, Any]]) -> Drawn:
    """A row a design: effects by size, and the largest interactions as the four means behind each."""
    del failures
    designs = design_of_runs(runs)
    tables = {name: _table(design) for name, design in designs.items()}
    figure = plt.figure(figsize=(PAGE_IN, 2.75 * len(designs) + 0.5))
    rows = figure.subfigures(len(designs), 1, squeeze=False)[:, 0]
    for row, (name, design) in zip(rows, designs.items(), strict=True):
        left, right = row.subfigures(1, 2, width_ratios=(1.55, 1))
        table = tables[name]
        axis = left.subplots()
        _draw_effects(axis, table)
        axis.set_title(
            f"{runs['model'].iloc[0]} on {runs['hardware'].iloc[0]}, {name or 'all'}: {design.num_runs} runs"
        )
        pairs = list(dict.fromkeys(table.loc[table["drawn_in"] == MEANS, "effect"]))
        for pair, place in zip(pairs, np.atleast_1d(right.subplots(len(pairs), 1)), strict=True):
            _draw_pair(place, pair, table[(table["drawn_in"] == MEANS) & (table["effect"] == pair)])
    figure.legend(
        handles=[
            Patch(facecolor=SPARE[0], label="main effect"),
            Patch(facecolor="white", edgecolor=SPARE[1], hatch="////", label="two-way interaction"),
            Patch(facecolor="#DDDDDD", label="does not stand out (95 %)"),
        ],
        loc="outside upper center",
        ncols=3,
    )
    effects = {name: table[table["drawn_in"] != MEANS] for name, table in tables.items()}
    claims = [claim for name, design in designs.items() for claim in _claims(runs, name, design, effects[name])]
    told = [table.assign(runs=name or "all", num_runs=designs[name].num_runs) for name, table in tables.items()]
    return Drawn(figure, pd.concat(told, ignore_index=True)[list(COLUMNS)], claims)


def _table(design: Design) -> pd.DataFrame:
    """All effects by size, of which the first NUM_BARS are bars; then the means behind the largest interactions."""
    names = [f.name for f in design.factors]
    found = {(order, m): e for order in (1, 2) for m, e in design.effects(order).items()}
    margin = max(lenth(np.array(list(found.values())))[1], remainder(design)[1])
    total = float(((design.log_rate - design.log_rate.mean()) ** 2).sum())
    rows = []
    for (order, members), effect in found.items():
        first = design.factors[members[0]]
        rows.append(
            {
                "effect": " x ".join(names[i] for i in members),
                "order": order,
                "low": first.level(-1) if order == 1 else "",
                "high": first.level(1) if order == 1 else "",
                "log_effect": effect,
                "times": float(np.exp(effect)),
                "stands_out": abs(effect) > margin,
                "margin_times": float(np.exp(margin)),
                "share_of_variance": len(design.log_rate) * effect**2 / 4 / total if total else 0.0,
            }
        )
    effects = pd.DataFrame(rows).sort_values("log_effect", key=abs, ascending=False, kind="stable")
    effects["drawn_in"] = np.where(np.arange(len(effects)) < NUM_BARS, BARS, "")
    pairs = list(effects.loc[effects["order"] == 2, "effect"])[:NUM_PAIRS]
    means = [row for pair in pairs for row in _means(design, pair)]
    return pd.concat([effects, pd.DataFrame(means)], ignore_index=True)


def _means(design: Design, pair: str) -> list[dict[str, Any]]:
    """Geometric mean throughput at the four combinations of two factors."""
    names = [f.name for f in design.factors]
    i, j = (names.index(part) for part in pair.split(" x "))
    rows = []
    for x, y in product((-1, 1), repeat=2):
        mean = float(np.exp(design.log_rate[(design.coded[:, i] == x) & (design.coded[:, j] == y)].mean()))
        levels = {"first_level": design.factors[i].level(x), "second_level": design.factors[j].level(y)}
        rows.append({"effect": pair, "order": 2, "drawn_in": MEANS, "tokens_per_s": mean} | levels)
    return rows


def _draw_effects(axis: Any, table: pd.DataFrame) -> None:
    shown = table[table["drawn_in"] == BARS]
    margin = float(shown["margin_times"].iloc[0])
    axis.axvspan(1 / margin, margin, color="#DDDDDD", zorder=0)
    for i, (_, row) in enumerate(shown.iterrows()):
        face, edge, hatch = (SPARE[0], SPARE[0], None) if row["order"] == 1 else ("white", SPARE[1], "////")
        axis.barh(i, row["times"] - 1, left=1, color=face, edgecolor=edge, hatch=hatch, linewidth=0.8, height=0.7)
    labels = [
        f"{row['effect']}: {row['low']} to {row['high']}" if row["order"] == 1 else row["effect"]
        for _, row in shown.iterrows()
    ]
    axis.set_yticks(range(len(shown)), labels)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.7)
    axis.set_xscale("log")
    _plain(axis.xaxis)
    axis.set_xlabel("multiplies throughput by")
    axis.grid(axis="y", visible=False)


def _draw_pair(axis: Any, pair: str, means: pd.DataFrame) -> None:
    first, second = pair.split(" x ")
    looks = ((SPARE[2], "-", "o"), (SPARE[3], "--", "s"))
    for (level, part), (colour, line, marker) in zip(means.groupby("second_level", sort=False), looks, strict=True):
        axis.plot([0, 1], part["tokens_per_s"], color=colour, linestyle=line, marker=marker, label=level)
    axis.set_xticks([0, 1], list(dict.fromkeys(means["first_level"])))
    axis.set_xlim(-0.25, 1.25)
    axis.set_yscale("log")
    _plain(axis.yaxis)
    axis.set_ylabel("tokens/s")
    axis.set_title(f"by {first} and {second}")
    axis.set_xlabel(first)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=2, title=second)
    axis.margins(y=0.2)


def _plain(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    low, high = axis.get_view_interval()
    digits = "25" if high / low < 12 else "3" if high / low < 200 else ""  # Of the minor ticks that bear a label.
    axis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:g}" if f"{v:e}"[0] in digits else ""))


def _claims(runs: pd.DataFrame, name: str, design: Design, table: pd.DataFrame) -> list[str]:
    claims = [
        _about(runs, design, table),
        _largest(table),
        *[_hint(design, i) for i, factor in enumerate(design.factors) if factor.name in HINTS],
        _hurts(design, table),
        _ends(design),
    ]
    return [f"{name[0].upper()}{name[1:]}: {claim}" if name else claim for claim in claims]


def _about(runs: pd.DataFrame, design: Design, table: pd.DataFrame) -> str:
    num, of = len(design.log_rate), 2 ** len(design.factors)
    repeats = f" ({design.num_runs} runs)" if design.num_runs > num else ""
    if design.measured and min(map(len, design.rates)) < MIN_REPEATS:
        repeats += f", some with fewer than the {MIN_REPEATS} repeats that tell two combinations apart"
    explained = float(table["share_of_variance"].sum())
    pse, lenths = lenth(table["log_effect"].to_numpy(float))
    rms, beyond = remainder(design)
    where = f"{runs['model'].iloc[0]} on a {runs['origin'].iloc[0]} {runs['hardware'].iloc[0]}"
    return (
        f"{where}{inserted(served(runs)) or ','} {num} of {of} combinations of {len(design.factors)} factors{repeats}; "
        f"main effects and two-way interactions explain {100 * explained:.1f} % of the variance of log throughput. "
        f"Lenth's pseudo standard error of them is {pse:.3g} (margin x{np.exp(lenths):.3g}), the root mean square of "
        f"the contrasts of three factors and more {rms:.3g} (margin x{np.exp(beyond):.3g}); an effect stands out "
        f"beyond the larger margin."
    )


def _largest(table: pd.DataFrame) -> str:
    strong = table[table["stands_out"]]
    if strong.empty:
        return "No main effect or two-way interaction stands out from the others."
    each = ", ".join(f"{row['effect']} x{row['times']:.2f}" for _, row in strong.head(6).iterrows())
    more = "" if len(strong) <= 6 else f" and {len(strong) - 6} more"
    return f"{len(strong)} of {len(table)} effects stand out: {each}{more}."


def _ratios(design: Design, i: int) -> list[Ratio]:
    """High over low of one factor, at every combination of the others that was run at both."""
    rest = np.delete(design.coded, i, axis=1)
    rates = {(*row, x): y for row, x, y in zip(map(tuple, rest), design.coded[:, i], design.rates, strict=True)}
    pairs = [(rates.get((*row, 1.0)), rates.get((*row, -1.0))) for row in dict.fromkeys(map(tuple, rest))]
    return [
        judge(high, low, MIN_CHANGE, measured=design.measured)
        for high, low in pairs
        if high is not None and low is not None
    ]


def _hint(design: Design, i: int) -> str:
    factor, ratios = design.factors[i], _ratios(design, i)
    line = f"{factor.name} ({factor.level(-1)} to {factor.level(1)}) multiplies throughput by "
    line += f"{np.exp(design.effect([i])):.2f} in the mean"
    if not ratios:
        return f"{line}; the fraction has no pair that differs in it alone."
    num = Counter(ratio.word for ratio in ratios)
    doubt = f", is AMBIGUOUS in {num['AMBIGUOUS']}" if design.measured else ""
    return (
        f"{line}, and by {min(r.ratio for r in ratios):.2f} to {max(r.ratio for r in ratios):.2f} over the "
        f"{len(ratios)} combinations of the rest: it helps in {num['HIGHER']}, hurts in {num['LOWER']}{doubt}, and "
        f"changes less than 1 % in {num['SAME']}."
    )


def _hurts(design: Design, table: pd.DataFrame) -> str:
    mains = table[(table["order"] == 1) & table["effect"].isin(HINTS)]
    bad = mains[(mains["times"] < 1 - MIN_CHANGE) & mains["stands_out"]].sort_values("times")
    if not bad.empty:
        each = ", ".join(f"{row['effect']} = {row['high']} (x{row['times']:.2f})" for _, row in bad.iterrows())
        return f"Hints that hurt in the mean: {each}."
    found = {i: _ratios(design, i) for i, factor in enumerate(design.factors) if factor.name in HINTS}
    hurts = [(ratio.ratio, i) for i, ratios in found.items() for ratio in ratios if ratio.word == "LOWER"]
    if not hurts:
        doubts = sum(ratio.word == "AMBIGUOUS" for ratios in found.values() for ratio in ratios)
        doubt = f"; {doubts} comparisons of single combinations are AMBIGUOUS" if doubts else ""
        return f"No hint hurts, neither in the mean nor in any combination{doubt}."
    worst, i = min(hurts)
    return (
        f"No hint hurts in the mean by more than the margin of error; the worst in one combination is "
        f"{design.factors[i].name} = {design.factors[i].level(1)} (x{worst:.2f})."
    )


def _ends(design: Design) -> str:
    best, worst = int(design.log_rate.argmax()), int(design.log_rate.argmin())

    def told(row: int) -> str:
        levels = ", ".join(
            f"{f.name} {f.level(int(x))}" for f, x in zip(design.factors, design.coded[row], strict=True)
        )
        return f"{np.exp(design.log_rate[row]):.0f} tokens/s ({levels})"

    return (
        f"The best combination makes {told(best)}, the worst {told(worst)}: a factor of "
        f"{np.exp(design.log_rate[best] - design.log_rate[worst]):.0f}."
    )


STUDY = Study(
    name="hints",
    title="Hints, prefetch distance, layout and block size on managed memory",
    question="Which advice to the Unified-Memory driver helps, which hurts, and what does that depend on?",
    how_to_read=(
        "Every bar is what one setting does to throughput, averaged over all combinations of the others: to the right "
        "of 1 it helps, to the left it hurts. A hatched bar is an interaction: with the second setting at its high "
        "level the first one's effect is multiplied by so much, at its low level divided by it. Bars that stay within "
        "the grey band do not stand out from the others. On the right, the means behind the largest interactions; "
        "lines that are not parallel are an interaction. Prefetching ahead needs layer_major memory, so that the "
        "layout is varied under demand paging only."
    ),
    factors=("model", *(f"hints.{name}" for name in HINT_COLUMNS), "placement", "layout", "block_size"),
    draw=draw,
    experiments=("hints", "hints_demand"),
)
