"""Hints, prefetch distance, layout and block size on managed memory: a two-level design, main effects, interactions.

Effects are of the logarithm of throughput, so that they multiply: a main effect is the mean of the runs at a factor's
high level less that at its low one, an interaction of A and B half of what B's high level adds to A's effect less what
its low level does (Box, Hunter and Hunter, Statistics for Experimenters, 2005, chapters 5 and 6). A deterministic
simulator has no replicate noise, so that an effect is judged by whether it stands out from the others: beyond the
margin of error of Lenth's pseudo standard error ("Quick and Easy Analysis of Unreplicated Factorials",
Technometrics 31, 1989) and beyond that of what main effects and two-way interactions leave unexplained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray
from scipy.stats import t as student_t

from uvm_kv.analysis.study.base import Drawn, Study, throughput
from uvm_kv.analysis.style import PAGE_IN, SPARE

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
    "effect",
    "order",
    "low",
    "high",
    "log_effect",
    "times",
    "stands_out",
    "margin_times",
    "share_of_variance",
)


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
    if len(models := sorted(set(runs["model"]))) > 1:
        raise ValueError(f"hints: runs of several models ({', '.join(models)}); give those of one")
    levels = _levels(runs)
    ahead = levels[LAYERS_AHEAD] > 0
    if ahead.all() or not ahead.any():
        return {"": _design(levels, throughput(runs))}
    parts = {"demand paging": ~ahead, "prefetching ahead": ahead}
    return {name: _design(levels[mask], throughput(runs)[mask]) for name, mask in parts.items()}


def _design(levels: pd.DataFrame, rate: pd.Series[float]) -> Design:
    factors = []
    for name in levels:
        found = _ordered(levels[name].unique().tolist())
        if len(found) > 2:
            raise ValueError(f"hints: {name} takes {len(found)} values ({found}); a two-level design has two of each")
        if len(found) == 2:
            factors.append(Factor(str(name), *found))
    if len(factors) < 2:
        raise ValueError("hints: fewer than two factors vary; there is nothing to tell apart")
    coded = np.column_stack([np.where(levels[f.name] == f.high, 1.0, -1.0) for f in factors])
    if len(np.unique(coded, axis=0)) < len(coded):
        raise ValueError("hints: several runs of one combination; they must differ in the factors and nothing else")
    terms = [coded[:, list(m)].prod(axis=1) for n in (1, 2) for m in combinations(range(len(factors)), n)]
    model = np.column_stack([np.ones(len(coded)), *terms])
    if not np.allclose(model.T @ model, len(coded) * np.eye(model.shape[1])):
        full = 2 ** len(factors)
        raise ValueError(
            f"hints: {len(coded)} runs are not a balanced half or whole of the {full} combinations of "
            f"{', '.join(f.name for f in factors)}; run what is missing"
        )
    order = np.lexsort(coded.T[::-1])  # The same sums, whatever the order of the runs.
    return Design(tuple(factors), coded[order], np.log(rate.to_numpy(float))[order])


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
            f"{runs['model'].iloc[0]} on {runs['hardware'].iloc[0]}, {name or 'all'}: {len(design.log_rate)} runs"
        )
        names = [f.name for f in design.factors]
        pairs = list(table.loc[table["order"] == 2, "effect"])[:NUM_PAIRS]
        for pair, place in zip(pairs, np.atleast_1d(right.subplots(len(pairs), 1)), strict=True):
            _draw_pair(place, design, tuple(names.index(part) for part in pair.split(" x ")))
    figure.legend(
        handles=[
            Patch(facecolor=SPARE[0], label="main effect"),
            Patch(facecolor="white", edgecolor=SPARE[1], hatch="////", label="two-way interaction"),
            Patch(facecolor="#DDDDDD", label="does not stand out (95 %)"),
        ],
        loc="outside upper center",
        ncols=3,
    )
    claims = [claim for name, design in designs.items() for claim in _claims(runs, name, design, tables[name])]
    told = pd.concat([table.assign(runs=name or "all") for name, table in tables.items()], ignore_index=True)
    return Drawn(figure, told[list(COLUMNS)], claims)


def _table(design: Design) -> pd.DataFrame:
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
    table = pd.DataFrame(rows)
    return table.sort_values("log_effect", key=abs, ascending=False, kind="stable").reset_index(drop=True)


def _draw_effects(axis: Any, table: pd.DataFrame) -> None:
    shown = table.head(NUM_BARS)
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


def _draw_pair(axis: Any, design: Design, members: tuple[int, ...]) -> None:
    """Geometric mean throughput at the four combinations of two factors."""
    first, second = (design.factors[i] for i in members)
    a, b = (design.coded[:, i] for i in members)
    for sign, colour, line, marker in ((-1, SPARE[2], "-", "o"), (1, SPARE[3], "--", "s")):
        means = [float(np.exp(design.log_rate[(a == x) & (b == sign)].mean())) for x in (-1, 1)]
        axis.plot([0, 1], means, color=colour, linestyle=line, marker=marker, label=second.level(sign))
    axis.set_xticks([0, 1], [f"{first.level(-1)}", f"{first.level(1)}"])
    axis.set_xlim(-0.25, 1.25)
    axis.set_yscale("log")
    _plain(axis.yaxis)
    axis.set_ylabel("tokens/s")
    axis.set_title(f"{first.name}, by {second.name}:")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=2)
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
    explained = float(table["share_of_variance"].sum())
    pse, lenths = lenth(table["log_effect"].to_numpy(float))
    rms, beyond = remainder(design)
    return (
        f"{runs['model'].iloc[0]} on a {runs['origin'].iloc[0]} {runs['hardware'].iloc[0]}, {num} of {of} combinations "
        f"of {len(design.factors)} factors; main effects and two-way interactions explain {100 * explained:.1f} % of "
        f"the variance of log throughput. Lenth's pseudo standard error of them is {pse:.3g} (margin x"
        f"{np.exp(lenths):.3g}), the root mean square of the contrasts of three factors and more {rms:.3g} (margin x"
        f"{np.exp(beyond):.3g}); an effect stands out beyond the larger margin."
    )


def _largest(table: pd.DataFrame) -> str:
    strong = table[table["stands_out"]]
    if strong.empty:
        return "No main effect or two-way interaction stands out from the others."
    each = ", ".join(f"{row['effect']} x{row['times']:.2f}" for _, row in strong.head(6).iterrows())
    more = "" if len(strong) <= 6 else f" and {len(strong) - 6} more"
    return f"{len(strong)} of {len(table)} effects stand out: {each}{more}."


def _ratios(design: Design, i: int) -> NDArray[np.float64]:
    """High over low of one factor, at every combination of the others that was run at both."""
    rest = np.delete(design.coded, i, axis=1)
    rates = {(*row, x): y for row, x, y in zip(map(tuple, rest), design.coded[:, i], design.log_rate, strict=True)}
    pairs = [(rates.get((*row, 1.0)), rates.get((*row, -1.0))) for row in dict.fromkeys(map(tuple, rest))]
    found: NDArray[np.float64] = np.exp([high - low for high, low in pairs if high is not None and low is not None])
    return found


def _hint(design: Design, i: int) -> str:
    factor, ratios = design.factors[i], _ratios(design, i)
    line = f"{factor.name} ({factor.level(-1)} to {factor.level(1)}) multiplies throughput by "
    line += f"{np.exp(design.effect([i])):.2f} in the mean"
    if not len(ratios):
        return f"{line}; the fraction has no pair that differs in it alone."
    helps, hurts = int((ratios > 1 + MIN_CHANGE).sum()), int((ratios < 1 - MIN_CHANGE).sum())
    return (
        f"{line}, and by {ratios.min():.2f} to {ratios.max():.2f} over the {len(ratios)} combinations of the rest: it "
        f"helps in {helps}, hurts in {hurts}, and changes less than 1 % in {len(ratios) - helps - hurts}."
    )


def _hurts(design: Design, table: pd.DataFrame) -> str:
    mains = table[(table["order"] == 1) & table["effect"].isin(HINTS)]
    bad = mains[(mains["times"] < 1 - MIN_CHANGE) & mains["stands_out"]].sort_values("times")
    if not bad.empty:
        each = ", ".join(f"{row['effect']} = {row['high']} (x{row['times']:.2f})" for _, row in bad.iterrows())
        return f"Hints that hurt in the mean: {each}."
    index = [i for i, f in enumerate(design.factors) if f.name in HINTS]
    worst = {i: float(_ratios(design, i).min(initial=1.0)) for i in index}
    if not worst or min(worst.values()) >= 1 - MIN_CHANGE:
        return "No hint hurts, neither in the mean nor in any combination."
    i = min(worst, key=worst.__getitem__)
    return (
        f"No hint hurts in the mean by more than the margin of error; the worst in one combination is "
        f"{design.factors[i].name} = {design.factors[i].level(1)} (x{worst[i]:.2f})."
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
