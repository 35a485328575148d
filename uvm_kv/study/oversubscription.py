"""Throughput and migrated bytes against working set over capacity, and where the cliff is.

The working set of a point is the KV of all clients' full requests, over the device KV (`working_set_ratio`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from uvm_kv.report.load import points
from uvm_kv.report.statistics import judge
from uvm_kv.report.style import PAGE_IN, SMALL, STYLES, style_of
from uvm_kv.report.verdict import MEASURED
from uvm_kv.study.base import Drawn, Study
from uvm_kv.study.kit import served
from uvm_kv.types import BASELINES, Layout

LAYOUTS = {Layout.LAYER_MAJOR.value: "-", Layout.BLOCK_MAJOR.value: "--"}
TOOLS = {"none": "", "device": "prefer device", "host": "prefer host", "by_tier": "by tier"}
MARKERS = "<>12348p"
NEAR = (0.92, 1.12)
"""Within it lies what the enlarged panel shows."""
TICKS = (0.5, 0.75, 1, 1.5, 2, 3, 4)
AFTER = (1.05, 2.0)
"""Ratios at which what is lost is said: at the first point tried from there on."""
STANDS = 0.5
"""A throughput below this part of the best one within the capacity has fallen off the cliff."""
LITTLE = 0.01
NEARLY = 0.05
"""Lines that within the capacity lose no more than this on the fastest are called the same there."""
DEMAND = "managed_demand"


def draw(runs: pd.DataFrame, failures: Sequence[dict[str, Any]]) -> Drawn:
    """Throughput, the same enlarged around the capacity, bytes moved a token; layouts by the dash of the line."""
    del failures
    table = _table(runs)
    curves = sorted(set(table["curve"]), key=lambda name: (name not in STYLES, name))
    look, below = _looks(curves), _stacked(table)
    figure, (whole, near, moved) = plt.subplots(1, 3, figsize=(PAGE_IN, 3.2))
    # Broad lines first, so that what lies on them leaves their edges to be seen.
    lines = sorted(table.groupby(["curve", "layout"], sort=True), key=lambda it: -below[it[0]])
    for (curve, layout), part in lines:
        part = part.sort_values("working_set_ratio")
        style = look[str(curve)] | {"linestyle": LAYOUTS.get(str(layout), ":")} | _breadth(below[curve, layout])
        whole.plot(part["working_set_ratio"], part["throughput"], **style)
        close = part[part["working_set_ratio"].between(*NEAR)]
        near.plot(close["working_set_ratio"], close["throughput"], **style)
        moved.plot(part["working_set_ratio"], part["moved_mb_per_token"], **style)
    for axis in (whole, near):
        axis.set_yscale("log")
        axis.set_ylim(_decades(table["throughput"]))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.set_ylabel("output tokens/s")
    moved.set_yscale("symlog", linthresh=1, linscale=0.4)
    moved.set_ylim(bottom=0)
    moved.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    moved.set_ylabel("MB over the link per output token")
    for axis in (whole, moved):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(TICKS))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    shown = table["working_set_ratio"][table["working_set_ratio"].between(*NEAR)]
    if len(shown):
        near.set_xlim(min(shown.min(), 1) - 0.01, max(shown.max(), 1) + 0.01)
    for axis, title in zip((whole, near, moved), ("Throughput", "Around the capacity", "Migrated"), strict=True):
        axis.axvline(1, color="black", linewidth=0.6, linestyle=(0, (1, 2)), zorder=0)
        axis.set_xlabel("working set / device KV")
        axis.set_title(title)
    broadest = {name: max(n for (curve, _), n in below.items() if curve == name) for name in curves}
    handles = [Line2D([], [], label=name, **look[name], **_breadth(broadest[name])) for name in curves]
    handles += [
        Line2D([], [], color="black", linestyle=line, label=layout)
        for layout, line in LAYOUTS.items()
        if layout in set(table["layout"])
    ]
    where = f"{table['title'].iloc[0].partition(', on a ')[0]} tokens, {runs['hardware'].iloc[0]}"
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=SMALL, title=where)
    return Drawn(figure, table.drop(columns=["title", "group", "throughputs"]), claims(table, served(runs)))


def _decades(values: pd.Series[float]) -> tuple[float, float]:
    return float(values.min()) / 1.5, float(values.max()) * 1.5


def _stacked(table: pd.DataFrame) -> dict[Any, int]:
    """Of each line (curve, layout): how many of later curves lie on it, as `_coincide` has it."""
    found = {}
    for layout, lines in table.groupby("layout", sort=True):
        parts = {str(c): part.set_index("working_set_ratio") for c, part in lines.groupby("curve", sort=True)}
        names = sorted(parts, key=lambda name: (name not in STYLES, name))
        for i, name in enumerate(names):
            found[name, layout] = sum(_coincide(parts[name], parts[rest]) for rest in names[i + 1 :])
    return found


def _breadth(below: int) -> dict[str, Any]:
    return {"linewidth": 1.1 + 1.2 * below, "markersize": 3.2 + 1.6 * below}


def _coincide(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Equal within 2 x LITTLE at the points that both have, in throughput and bytes; some of these must lie beyond the
    capacity, because within it most curves are one."""
    both = one.index.intersection(other.index)
    if not (both > 1).any():
        return False
    columns = ["throughput", "moved_mb_per_token"]
    a, b = one.loc[both, columns].to_numpy(float), other.loc[both, columns].to_numpy(float)
    return bool(np.isclose(a, b, rtol=2 * LITTLE, atol=0.05).all())


def _looks(curves: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A mechanism as everywhere; what has hints of its own, in the spare colours."""
    found: dict[str, dict[str, Any]] = {}
    others = [curve for curve in curves if curve not in STYLES]
    for curve in curves:
        colour, _, marker = style_of(curve, others)
        if curve in others:
            marker = MARKERS[others.index(curve) % len(MARKERS)]
        found[curve] = {"color": colour, "marker": marker}
    return found


def curve_name(run: pd.Series[Any]) -> str:
    """The mechanism; of one whose hints are not those of its name (mechanism=custom), placement and hints."""
    if run["mechanism"] != "custom":
        return str(run["mechanism"])
    said = [TOOLS.get(str(run["hints.preferred_location"]), str(run["hints.preferred_location"]))]
    said += [name for name in ("accessed_by", "read_mostly", "discard_on_free") if bool(run[f"hints.{name}"])]
    hints = ", ".join(text for text in said if text)
    what = run["placement"] if run["memory"] == "managed" else f"{run['memory']} {run['placement']}"
    return f"{what}: {hints or 'no hints'}"


def _table(runs: pd.DataFrame) -> pd.DataFrame:
    """Medians by curve, layout and working set. ValueError where the runs are several comparisons or say no ratio."""
    if "working_set_ratio" not in runs or runs["working_set_ratio"].isna().all():
        raise ValueError(
            "oversubscription: no run says its working_set_ratio: it takes a closed_loop of workload=fixed"
        )
    used = runs[runs["working_set_ratio"].notna()].copy()
    used["curve"] = [curve_name(run) for _, run in used.iterrows()]
    used["moved_mb_per_token"] = (used["h2d_bytes"] + used["d2h_bytes"]).astype(float) / used["num_output_tokens"] / 1e6
    parts = []
    for (curve, layout), part in used.groupby(["curve", "layout"], sort=True):
        made = points(part)
        if made["label"].nunique() > 1:
            raise ValueError(f"oversubscription: {curve}, {layout}: several lines in one: {sorted(set(made['label']))}")
        made["curve"], made["layout"] = str(curve), str(layout)
        parts.append(made)
    table = pd.concat(parts, ignore_index=True)
    if table["title"].nunique() > 1:
        several = "; ".join(sorted(set(table["title"]))[:3])
        raise ValueError(f"oversubscription: the runs are of several comparisons ({several}); draw them one by one")
    columns = [
        "title",
        "group",
        "origin",
        "hardware",
        "model",
        "throughputs",
        "curve",
        "layout",
        "working_set_ratio",
        "offered_batch",
        "throughput",
    ]
    columns += ["throughput_low", "throughput_high", "running_batch_mean", "moved_mb_per_token", "h2d_bytes"]
    columns += ["d2h_bytes", "gpu_fault_groups", "evicted_chunks", "stall_s", "kv_bytes_mean.used", "num_runs"]
    table["in_use_ratio"] = table["kv_bytes_mean.used"].astype(float) / table["device_kv_bytes"].astype(float)
    table = table[[*columns, "in_use_ratio"]]
    return table.sort_values(["curve", "layout", "working_set_ratio"]).reset_index(drop=True)


def claims(table: pd.DataFrame, scope: str) -> list[str]:
    """Where each line falls and by how much, then layer_major against block_major. `scope`: what was served."""
    said = [*_headline(table, scope), *_within(table)]
    said += [
        _cliff(f"{curve}, {layout}", part)
        for (curve, layout), part in table.groupby(["curve", "layout"], sort=True)
        if curve not in BASELINES
    ]
    for curve, part in table.groupby("curve", sort=True):
        if set(LAYOUTS) <= set(part["layout"]) and curve not in BASELINES:
            said.append(_layouts(str(curve), part))
    return said


def _headline(table: pd.DataFrame, scope: str) -> list[str]:
    """Demand paging without hints against the best of the rest, past the capacity; nothing where a side is absent."""
    beyond = table[(table["working_set_ratio"] > 1) & ~table["curve"].isin(BASELINES)]
    within = table[table["working_set_ratio"] <= 1].groupby(["curve", "layout"])["throughput"].max()
    beyond = beyond.join(within.rename("within"), on=["curve", "layout"]).dropna(subset=["within"])
    demand, rest = beyond[beyond["curve"] == DEMAND], beyond[beyond["curve"] != DEMAND]
    if demand.empty or rest.empty:
        return []
    share = demand["throughput"] / demand["within"]
    top = rest.reset_index(drop=True)
    top = top.loc[[(top["throughput"] / top["within"]).idxmax()]]
    gain = float((top["throughput"] / top["within"]).iloc[0])
    where = f"{top['curve'].iloc[0]} at {float(top['working_set_ratio'].iloc[0]):.3g}"
    curve, layout = top["curve"].iloc[0], top["layout"].iloc[0]
    inside = table[(table["working_set_ratio"] <= 1) & (table["curve"] == curve) & (table["layout"] == layout)]
    best = inside.loc[inside["throughput"].idxmax()]
    measured = bool((table["origin"] == MEASURED).all())
    word = judge(top["throughputs"].iloc[0], best["throughputs"], LITTLE, measured=measured).word
    if word == "AMBIGUOUS":
        verb = f"whether any raises it is AMBIGUOUS, the best reaches {gain:.2f} times that"
    else:
        verb = f"the best raises it to {gain:.2f} times that" if word == "HIGHER" else "none raises it"
    return [
        f"Once the working set passes the device KV, demand paging without hints keeps {share.min():.0%} to "
        f"{share.max():.0%} of the throughput that it has within it; of the other hints and placements "
        f"{verb} ({where}){f'; this is of {scope}' if scope else ''}."
    ]


def _within(table: pd.DataFrame) -> list[str]:
    """Up to the capacity: which lines are as fast as the fastest at every ratio, and which are not."""
    inside = table[table["working_set_ratio"] <= 1].copy()
    if inside.empty or inside["curve"].nunique() < 2:
        return []
    inside["best"] = inside.groupby("working_set_ratio")["throughput"].transform("max")
    inside["lost"] = 1 - inside["throughput"] / inside["best"]
    apart = [(c, layout) for (c, layout), part in inside.groupby(["curve", "layout"]) if part["lost"].max() > NEARLY]
    lines = pd.MultiIndex.from_frame(inside[["curve", "layout"]])
    rest = inside[~lines.isin(apart)]
    same = "every line" if not apart else "every other line"
    most = (
        f"the same throughput within {rest['lost'].max():.1%} of the fastest" if len(rest) else "less than the fastest"
    )
    span = f"{rest['throughput'].min():.0f} to {rest['throughput'].max():.0f} tok/s"
    if not apart:
        return [f"Within the capacity {same} makes {most} ({span})."]
    told = []
    for curve, layout in apart:
        part = inside[(inside["curve"] == curve) & (inside["layout"] == layout)]
        speed, moved = part["throughput"], part["moved_mb_per_token"]
        told.append(
            f"{curve}, {layout}, makes {speed.min():.0f} to {speed.max():.0f} tok/s and moves up to {moved.max():.3g} "
            f"MB per output token"
        )
    return [f"Within the capacity {'; '.join(told)}; {same} makes {most} ({span})."]


def _cliff(name: str, part: pd.DataFrame) -> str:
    part = part.sort_values("working_set_ratio")
    ratio, speed = part["working_set_ratio"].to_numpy(float), part["throughput"].to_numpy(float)
    within, beyond = ratio <= 1, ratio > 1
    if not within.any() or not beyond.any():
        return f"{name}: no point {'beyond' if within.any() else 'within'} the capacity, so that no cliff can be found."
    best = speed[within].max()
    fallen = beyond & (speed < STANDS * best)
    losses = []
    for after in AFTER:
        if (later := np.flatnonzero(ratio >= after)).size:
            losses.append(f"at {ratio[later[0]]:.3g} it is {_factor(speed[later[0]] / best)}")
    lost = "; ".join(losses)
    if not fallen.any():
        text = f"{name}: no cliff up to {ratio[-1]:.3g}, where it still has {speed[-1] / best:.0%} of its best within"
        return f"{text} the capacity ({best:.0f} tok/s); {lost}."
    first = int(np.flatnonzero(fallen)[0])
    used = part["in_use_ratio"].to_numpy(float)[first]
    return (
        f"{name}: falls under half of its best within the capacity ({best:.0f} tok/s) between {ratio[first - 1]:.3g} "
        f"and {ratio[first]:.3g} ({used:.3g} counting KV in use), to {_factor(speed[first] / best)}; {lost}."
    )


def _factor(share: float) -> str:
    if share > 1 + LITTLE:
        return f"{share:.2f} times it"
    return "as fast" if share > 1 - LITTLE else f"slower by a factor of {1 / share:.3g}"


def _layouts(curve: str, part: pd.DataFrame) -> str:
    speeds = part.pivot_table(index="working_set_ratio", columns="layout", values="throughput").dropna()
    layer, block = speeds[Layout.LAYER_MAJOR.value], speeds[Layout.BLOCK_MAJOR.value]
    beyond = (layer / block)[speeds.index > 1]
    if beyond.empty:
        return f"{curve}: the two layouts have no point beyond the capacity in common."
    low, high = float(beyond.min()), float(beyond.max())
    if high < 1 + LITTLE and low > 1 - LITTLE:
        return f"{curve}: layer_major and block_major are equal within {LITTLE:.0%} everywhere beyond the capacity."
    return (
        f"{curve}: beyond the capacity layer_major is {float(beyond.median()):.2f} times as fast as block_major in the "
        f"median ({low:.2f} to {high:.2f})."
    )


STUDY = Study(
    name="oversubscription",
    experiments=("oversubscription", "oversubscription_hints"),
    title="Oversubscription: throughput and migration against the working set",
    question="What happens as the working set of the KV cache passes the card's capacity, and do hints or layout help?",
    how_to_read=(
        "From left to right more requests run at once; at 1 their KV just fills the card. Left of it nothing has to "
        "leave the card, and lines lie on each other unless a hint keeps KV in host memory all the same (the text "
        "names those). A broad line is one that others lie on. To the right of 1 the driver, or a placement of ours, "
        "must bring in over the link what is not on the card. With demand paging every step scans the whole cache in "
        "order, so that each page is evicted just before it is needed: 1 % too much moves everything, and the line "
        "falls off a cliff. Dashed: a chunk of memory holds all layers of one block instead of many blocks "
        "of one layer."
    ),
    factors=(
        "model",
        "mechanism",
        "memory",
        "placement",
        "layout",
        "hints.preferred_location",
        "hints.accessed_by",
        "hints.read_mostly",
        "offered_batch",
    ),
    draw=draw,
)
