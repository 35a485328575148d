"""Throughput and migrated bytes against working set over capacity, and where the cliff is.

The working set of a point is the KV of all clients' full requests, over the device KV (`working_set_ratio`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from uvm_kv.report.drawing import REFERENCE, Look, handle, log_scale, log_ticks, plain_numbers, without_look
from uvm_kv.report.load import points
from uvm_kv.report.statistics import judge
from uvm_kv.report.style import PAGE_IN, SMALL, STYLES, look
from uvm_kv.report.verdict import MEASURED
from uvm_kv.study.base import Drawn, Study
from uvm_kv.study.kit import argmax, one_comparison, served
from uvm_kv.types import BASELINES, Layout

LAYOUTS = {Layout.LAYER_MAJOR.value: "-", Layout.BLOCK_MAJOR.value: "--"}
TOOLS = {"none": "", "device": "prefer device", "host": "prefer host", "by_tier": "by tier"}
MARKERS = "<>12348p"
"""For lines whose hints are not those of a named mechanism."""
NEAR = (0.92, 1.12)
"""The range of ratios in the enlarged panel."""
TICKS = (0.5, 0.75, 1, 1.5, 2, 3, 4)
AFTER = (1.05, 2.0)
"""The loss is told at the first point tried from each of these ratios on."""
STANDS = 0.5
"""A throughput below this part of the best one within the capacity has fallen off the cliff."""
LITTLE = 0.01
NEARLY = 0.05
"""Lines that within the capacity lose no more than this on the fastest are called the same there."""
DEMAND = "managed_demand"


COLUMNS = ["title", "group", "origin", "hardware", "model", "throughputs", "curve", "layout", "working_set_ratio",
           "offered_batch", "throughput", "throughput_low", "throughput_high", "running_batch_mean",
           "moved_mb_per_token", "h2d_bytes", "d2h_bytes", "gpu_fault_groups", "evicted_chunks", "stall_s",
           "kv_bytes_mean.used", "num_runs", "in_use_ratio"]  # fmt: skip


def draw(runs: pd.DataFrame, _: Sequence[dict[str, Any]]) -> Drawn:
    """Throughput, the same enlarged around the capacity, bytes moved per token; layouts by the dash of the line."""
    table = _table(runs)
    curves = sorted(set(table["curve"]), key=lambda name: (name not in STYLES, name))
    looks, below = _looks(curves), _stacked(table, curves)
    figure, axes = plt.subplots(1, 3, figsize=(PAGE_IN, 3.2))
    whole, near, moved = axes
    is_near = table["working_set_ratio"].between(*NEAR)
    panels = ((whole, table, "throughput"), (near, table[is_near], "throughput"), (moved, table, "moved_mb_per_token"))
    # Broad lines first, so that what lies on them leaves their edges to be seen.
    for curve, layout in sorted(sorted(below), key=lambda line: -below[line]):
        style = looks[curve] | {"linestyle": LAYOUTS.get(layout, ":")} | _breadth(below[curve, layout])
        for axis, shown, column in panels:
            part = shown[(shown["curve"] == curve) & (shown["layout"] == layout)]
            axis.plot(part["working_set_ratio"], part[column], **style)
    for axis in (whole, near):
        log_scale(axis.yaxis)
        axis.set_ylim(table["throughput"].min() / 1.5, table["throughput"].max() * 1.5)
        axis.set_ylabel("output tokens/s")
    moved.set_yscale("symlog", linthresh=1, linscale=0.4)
    moved.set_ylim(bottom=0)
    plain_numbers(moved.yaxis)
    moved.set_ylabel("MB over the link per output token")
    for axis in (whole, moved):
        log_ticks(axis.xaxis, TICKS)
    if is_near.any():
        ratios = table["working_set_ratio"][is_near]
        near.set_xlim(min(ratios.min(), 1) - 0.01, max(ratios.max(), 1) + 0.01)
    for axis, title in zip(axes, ("Throughput", "Around the capacity", "Migrated"), strict=True):
        axis.axvline(1, **REFERENCE)
        axis.set_xlabel("working set / device KV")
        axis.set_title(title)
    broadest = {name: max(n for (curve, _), n in below.items() if curve == name) for name in curves}
    handles = [handle(name, **looks[name], **_breadth(broadest[name])) for name in curves]
    layouts = [layout for layout in LAYOUTS if layout in set(table["layout"])]
    handles += [handle(layout, color="black", linestyle=LAYOUTS[layout]) for layout in layouts]
    where = f"{table['title'].iloc[0].partition(', on a ')[0]} tokens, {runs['hardware'].iloc[0]}"
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=SMALL, title=where)
    return Drawn(figure, table.drop(columns=["title", "group", "throughputs"]), claims(table, served(runs)))


def _stacked(table: pd.DataFrame, curves: Sequence[str]) -> dict[tuple[str, str], int]:
    """For each line (curve, layout): how many of later curves lie on it, as `_coincide` says."""
    found = {}
    for layout, lines in table.groupby("layout", sort=True):
        parts = {str(curve): part.set_index("working_set_ratio") for curve, part in lines.groupby("curve")}
        names = [curve for curve in curves if curve in parts]
        for i, name in enumerate(names):
            found[name, str(layout)] = sum(_coincide(parts[name], parts[rest]) for rest in names[i + 1 :])
    return found


def _breadth(below: int) -> dict[str, Any]:
    return {"linewidth": 1.1 + 1.2 * below, "markersize": 3.2 + 1.6 * below}


def _coincide(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Whether two lines are equal within 2 x LITTLE at the points that both have, in throughput and bytes; some of them
    must lie beyond the capacity, because within it most curves are one."""
    both = one.index.intersection(other.index)
    if not (both > 1).any():
        return False
    columns = ["throughput", "moved_mb_per_token"]
    a, b = one.loc[both, columns].to_numpy(float), other.loc[both, columns].to_numpy(float)
    return bool(np.isclose(a, b, rtol=2 * LITTLE, atol=0.05).all())


def _looks(curves: Sequence[str]) -> dict[str, Look]:
    """A mechanism as everywhere; a line with hints of its own in the spare colours."""
    others = without_look(curves)
    looks = {name: look(name, others) for name in curves}
    looks |= {name: looks[name] | {"marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(others)}
    return {name: {"color": found["color"], "marker": found["marker"]} for name, found in looks.items()}


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
    """Medians by curve, layout and working set. ValueError where runs are of several comparisons or have no ratio."""
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
        parts.append(made.assign(curve=str(curve), layout=str(layout)))
    table = pd.concat(parts, ignore_index=True)
    one_comparison(table, "oversubscription: the runs")
    table["in_use_ratio"] = table["kv_bytes_mean.used"].astype(float) / table["device_kv_bytes"].astype(float)
    return table[COLUMNS].sort_values(["curve", "layout", "working_set_ratio"]).reset_index(drop=True)


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
    top = rest.iloc[int((rest["throughput"] / rest["within"]).argmax())]
    gain, where = top["throughput"] / top["within"], f"{top['curve']} at {top['working_set_ratio']:.3g}"
    own = (table["curve"] == top["curve"]) & (table["layout"] == top["layout"])
    best = argmax(table[own & (table["working_set_ratio"] <= 1)], "throughput")
    measured = bool((table["origin"] == MEASURED).all())
    word = judge(top["throughputs"], best["throughputs"], LITTLE, measured=measured).word
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
