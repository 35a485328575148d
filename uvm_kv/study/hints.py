"""Hints, prefetch distance, layout and block size on managed memory, as two-level designs (`factorial`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.patches import Patch

from uvm_kv.report.drawing import line_look, log_scale, plain_numbers
from uvm_kv.report.repeats import medians, one_of_each
from uvm_kv.report.statistics import MIN_REPEATS
from uvm_kv.report.style import PAGE_IN, SPARE
from uvm_kv.study.base import Drawn, Study
from uvm_kv.study.factorial import Design, effects_table, lenth, means, remainder, two_level_design
from uvm_kv.study.kit import inserted, on_card, panel_title, served, throughput

LAYERS_AHEAD = "layers ahead"
HINT_COLUMNS = ("preferred_location", "accessed_by", "read_mostly", "discard_on_free")
HINTS = tuple(name.replace("_", " ") for name in HINT_COLUMNS)
MIN_CHANGE = 0.01
"""A hint that moves throughput by less is said to do nothing in that combination."""
NUM_BARS = 14
NUM_PAIRS = 2
COLUMNS = ["runs", "num_runs", "drawn_in", "effect", "order", "low", "high", "log_effect", "times", "stands_out",
           "margin_times", "share_of_variance", "first_level", "second_level", "tokens_per_s"]  # fmt: skip
BARS, MEANS = "bars", "means"
"""Where a row of the table is drawn: an effect as a bar, or one of the four means behind an interaction."""


def _levels(runs: pd.DataFrame) -> pd.DataFrame:
    ahead = runs["variant"].map(lambda v: v["placement.num_layers_ahead"])
    location, *switches = (runs[f"hints.{name}"] for name in HINT_COLUMNS)
    return pd.DataFrame(
        {HINTS[0]: location}
        | {name: switch.astype(bool) for name, switch in zip(HINTS[1:], switches, strict=True)}
        | {
            LAYERS_AHEAD: ahead.where(runs["placement"] == "prefetch_ahead", 0).astype(int),
            "layout": runs["layout"],
            "block size": runs["block_size"].astype(int),
        }
    )


def design_of_runs(runs: pd.DataFrame) -> dict[str, Design]:
    """One design of all runs; or one of demand paging, with the layout as a factor, and one of prefetching ahead, with
    its distance, as that has no block_major. ValueError, with what is at fault, where one is no two-level design."""
    if "hints.preferred_location" not in runs or set(runs["memory"]) != {"managed"}:
        raise ValueError("hints: only runs of memory=managed have hints")
    one_of_each(runs, ("model", "hardware", "origin"), "hints")
    levels = _levels(runs)
    names = [str(name) for name in levels]
    rated = runs.drop(columns="layout").assign(rate=throughput(runs))
    found = medians(pd.concat([rated, levels], axis=1), names, keep=["rate"], study="hints")
    ahead = found[LAYERS_AHEAD] > 0
    both = {"demand paging": ~ahead, "prefetching ahead": ahead}
    parts = {name: found[mask] for name, mask in both.items()} if ahead.any() and not ahead.all() else {"": found}
    return {name: two_level_design(part, names, "hints") for name, part in parts.items()}


def draw(runs: pd.DataFrame, _: Sequence[dict[str, Any]]) -> Drawn:
    """A row per design: effects by size, and the largest interactions as the four means behind each."""
    designs = design_of_runs(runs)
    figure = plt.figure(figsize=(PAGE_IN, 2.75 * len(designs) + 0.5))
    rows = figure.subfigures(len(designs), 1, squeeze=False)[:, 0]
    tables, claims = [], []
    for row, (name, design) in zip(rows, designs.items(), strict=True):
        effects = effects_table(design)
        pairs = list(effects.loc[effects["order"] == 2, "effect"])[:NUM_PAIRS]
        behind = {pair: pd.DataFrame(means(design, pair)).assign(drawn_in=MEANS) for pair in pairs}
        left, right = row.subfigures(1, 2, width_ratios=(1.55, 1))
        axis = left.subplots()
        _draw_effects(axis, effects.head(NUM_BARS))
        axis.set_title(f"{panel_title(runs)}, {name or 'all'}: {design.num_runs} runs")
        for pair, place in zip(pairs, np.atleast_1d(right.subplots(len(pairs), 1)), strict=True):
            _draw_pair(place, pair, behind[pair])
        effects["drawn_in"] = np.where(effects.index < NUM_BARS, BARS, "")
        tables += [part.assign(runs=name or "all", num_runs=design.num_runs) for part in (effects, *behind.values())]
        title = f"{name[0].upper()}{name[1:]}: " if name else ""
        claims += [title + claim for claim in _claims(runs, design, effects)]
    kinds = [
        Patch(facecolor=SPARE[0], label="main effect"),
        Patch(facecolor="white", edgecolor=SPARE[1], hatch="////", label="two-way interaction"),
        Patch(facecolor="#DDDDDD", label="does not stand out (95 %)"),
    ]
    figure.legend(handles=kinds, loc="outside upper center", ncols=3)
    return Drawn(figure, pd.concat(tables, ignore_index=True)[COLUMNS], claims)


def _draw_effects(axis: Any, shown: pd.DataFrame) -> None:
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
    log_scale(axis.xaxis)
    _minor_labels(axis.xaxis)
    axis.set_xlabel("multiplies throughput by")
    axis.grid(axis="y", visible=False)


def _draw_pair(axis: Any, pair: str, means: pd.DataFrame) -> None:
    first, second = pair.split(" x ")
    looks = (line_look(SPARE[2], "-", "o"), line_look(SPARE[3], "--", "s"))
    for (level, part), style in zip(means.groupby("second_level", sort=False), looks, strict=True):
        axis.plot([0, 1], part["tokens_per_s"], label=level, **style)
    axis.set_xticks([0, 1], list(dict.fromkeys(means["first_level"])))
    axis.set_xlim(-0.25, 1.25)
    log_scale(axis.yaxis)
    _minor_labels(axis.yaxis)
    axis.set_ylabel("tokens/s")
    axis.set_title(f"by {first} and {second}")
    axis.set_xlabel(first)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=2, title=second)
    axis.margins(y=0.2)


def _minor_labels(axis: Any) -> None:
    """Label some minor ticks too where the axis spans few powers of ten."""
    low, high = axis.get_view_interval()
    plain_numbers(axis, "25" if high / low < 12 else "3" if high / low < 200 else "")


def _claims(runs: pd.DataFrame, design: Design, table: pd.DataFrame) -> list[str]:
    hints = [_hint(design, i) for i, factor in enumerate(design.factors) if factor.name in HINTS]
    return [_about(runs, design, table), _largest(table), *hints, _hurts(design, table), _ends(design)]


def _about(runs: pd.DataFrame, design: Design, table: pd.DataFrame) -> str:
    num, of = len(design.log_rate), 2 ** len(design.factors)
    repeats = f" ({design.num_runs} runs)" if design.num_runs > num else ""
    if design.measured and min(map(len, design.rates)) < MIN_REPEATS:
        repeats += f", some with fewer than the {MIN_REPEATS} repeats that tell two combinations apart"
    explained = float(table["share_of_variance"].sum())
    pse, lenths = lenth(table["log_effect"].to_numpy(float))
    rms, beyond = remainder(design)
    return (
        f"{on_card(runs)}{inserted(served(runs)) or ','} {num} of {of} combinations of {len(design.factors)} factors"
        f"{repeats}; main effects and two-way interactions explain {100 * explained:.1f} % of the variance of log "
        f"throughput. Lenth's pseudo standard error of them is {pse:.3g} (margin x{np.exp(lenths):.3g}), the root mean "
        f"square of the contrasts of three factors and more {rms:.3g} (margin x{np.exp(beyond):.3g}); an effect stands "
        f"out beyond the larger margin."
    )


def _largest(table: pd.DataFrame) -> str:
    strong = table[table["stands_out"]]
    if strong.empty:
        return "No main effect or two-way interaction stands out from the others."
    each = ", ".join(f"{row['effect']} x{row['times']:.2f}" for _, row in strong.head(6).iterrows())
    more = "" if len(strong) <= 6 else f" and {len(strong) - 6} more"
    return f"{len(strong)} of {len(table)} effects stand out: {each}{more}."


def _hint(design: Design, i: int) -> str:
    factor, ratios = design.factors[i], design.ratios(i, MIN_CHANGE)
    line = f"{factor.name} ({factor.level(-1)} to {factor.level(1)}) multiplies throughput by "
    line += f"{np.exp(design.effects()[i,]):.2f} in the mean"
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
    found = {i: design.ratios(i, MIN_CHANGE) for i, factor in enumerate(design.factors) if factor.name in HINTS}
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
    ends = [int(design.log_rate.argmax()), int(design.log_rate.argmin())]
    best, worst = (
        f"{np.exp(design.log_rate[row]):.0f} tokens/s "
        f"({', '.join(f'{f.name} {f.level(x)}' for f, x in zip(design.factors, design.coded[row], strict=True))})"
        for row in ends
    )
    times = np.exp(design.log_rate[ends[0]] - design.log_rate[ends[1]])
    return f"The best combination makes {best}, the worst {worst}: a factor of {times:.0f}."


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
