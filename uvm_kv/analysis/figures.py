"""Figures: of a batch-size sweep, of one run over time, and of simulated against recorded runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from uvm_kv.analysis.load import GROUP
from uvm_kv.analysis.recorded import Recording
from uvm_kv.analysis.style import PAGE_IN, STYLES, style_of
from uvm_kv.analysis.validate import METRICS, Comparison
from uvm_kv.types import BASELINES

MAX_SPANS = 300


def sweep_figure(table: pd.DataFrame) -> Any:
    """One row of panels per group of comparable points; `table` as `with_gains` returns it."""
    groups = [part for _, part in table.groupby(GROUP, sort=True)]
    figure, axes = plt.subplots(len(groups), 3, figsize=(PAGE_IN, 2.1 * len(groups) + 0.5), squeeze=False)
    others = sorted(set(table["label"]) - set(STYLES))
    shown: dict[str, Any] = {}
    for row, part in zip(axes, groups, strict=True):
        _panels(row, part, others, shown)
    order = [m for m in (*STYLES, *others) if m in shown]
    figure.legend(
        [shown[m] for m in order],
        [f"{m} (baseline)" if m in BASELINES else m for m in order],
        loc="outside lower center",
        ncols=4,
    )
    return figure


def _panels(axes: Any, part: pd.DataFrame, others: list[str], shown: dict[str, Any]) -> None:
    by_batch, gain, latency = axes
    for mechanism, rows in part.groupby("label", sort=True):
        name = str(mechanism)
        colour, line, marker = style_of(name, others)
        rows = rows.sort_values("offered_batch")
        look = {"color": colour, "linestyle": line, "marker": marker}
        throughput = rows["throughput"]
        bars = [throughput - rows["throughput_low"], rows["throughput_high"] - throughput]
        repeated = bool(rows["throughput_low"].notna().any())
        shown[name] = by_batch.errorbar(rows["offered_batch"], throughput, yerr=bars if repeated else None, **look)
        latency.plot(rows["tpot_s.p99"] * 1e3, rows["throughput"], **look)
        gain.plot(rows["offered_batch"], rows["gain_over_resident"], **look)
        bound = rows["closed_form_ceiling"].astype(float)
        if bound.notna().any():
            gain.plot(rows["offered_batch"], bound, color=colour, linestyle=(0, (1, 2)), linewidth=1.0)
    batches = part["offered_batch"]
    powers = [2**n for n in range(24) if batches.min() <= 2**n <= batches.max()]
    for axis in (by_batch, gain):
        axis.set_xscale("log", base=2)
        if len(powers) > 1:
            axis.set_xticks(powers, [str(b) for b in powers])
        axis.minorticks_off()
        axis.set_xlabel("offered batch (clients)")
    by_batch.set_ylabel("output tokens per second")
    by_batch.set_ylim(bottom=0)
    by_batch.set_title(part["title"].iloc[0].replace(", on a ", "\non a "))
    gain.axhline(0, color="black", linewidth=0.8)
    ceiling = part["closed_form_ceiling"].astype(float).max()
    top = max(0.05, float(part["gain_over_resident"].max()), 0.0 if pd.isna(ceiling) else min(float(ceiling), 1.0))
    gain.set_ylim(-0.5, top * 1.25)
    gain.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    gain.set_ylabel("gain over device_resident")
    gain.set_title("dotted: closed-form ceiling of the reach;\ncut off at -50 %")
    latency.set_xscale("log")
    latency.set_ylim(bottom=0)
    latency.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    latency.xaxis.set_minor_formatter(NullFormatter())
    latency.set_xlabel("p99 TPOT (ms)")
    latency.set_ylabel("output tokens per second")
    latency.set_title("up and left is better")


def run_figure(steps: dict[str, list[Any]], title: str) -> Any:
    """One run over time: batch, KV memory, link traffic and stalls, averaged over equal spans of steps."""
    observed = {name: np.array(v, float) for name, v in steps.items() if None not in v}
    num_steps = len(steps["step"])
    # A peer may tell no steps, or not all of their columns.
    spans = np.array_split(np.arange(num_steps), min(MAX_SPANS, num_steps)) if num_steps else []
    seconds = np.array([observed["end_ns"][s[-1]] for s in spans]) * 1e-9
    lasted = np.array([observed["end_ns"][s[-1]] - observed["start_ns"][s[0]] for s in spans]) * 1e-9

    def mean(name: str) -> Any:
        return np.array([observed[name][s].mean() for s in spans])

    def rate(*names: str) -> Any:
        return sum(np.array([observed[n][s].sum() for s in spans]) for n in names) / lasted

    figure, axes = plt.subplots(4, 1, figsize=(PAGE_IN, 6.5), sharex=True)
    for name in ("running", "waiting"):
        axes[0].plot(seconds, mean(f"num_{name}"), label=name)
    axes[0].set_ylabel("sequences")
    for name in ("claimed", "reserved", "used"):
        if f"kv_{name}_bytes" in observed:
            axes[1].plot(seconds, mean(f"kv_{name}_bytes") / 1e9, label=name)
    axes[1].set_ylabel("KV, GB")
    for direction in ("h2d", "d2h"):
        names = [n for n in observed if n.startswith(f"{direction}_")]
        if names:
            axes[2].plot(seconds, rate(*names) / 1e9, label=direction)
    axes[2].set_ylabel("link, GB/s")
    if "stall_ns" in observed:
        axes[3].plot(seconds, rate("stall_ns") * 1e-9, label="stall")
    axes[3].set_ylabel("share of time")
    axes[3].set_xlabel("seconds")
    axes[0].set_title(title)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.set_ylim(bottom=0)
        if axis.lines:
            axis.legend(loc="upper right")
    return figure


VERDICT_COLOURS = {"SAME": "#009E73", "FAST": "#0072B2", "SLOW": "#D55E00", "AMBIGUOUS": "#888888"}
LATENCIES = {"TTFT": ("first_token_ns", "#0072B2", "o"), "end to end": ("finish_ns", "#E69F00", "^")}
MAX_ERROR = 1.0


def validation_figure(
    pairs: Sequence[tuple[Recording, Recording]], rows: Sequence[Comparison], tolerance: float
) -> Any:
    """Simulated against recorded: latency of every request, its distribution, requests in the system, all errors."""
    figure, axes = plt.subplots(2, 2, figsize=(PAGE_IN, 5.2), width_ratios=[1, 1.15])
    (scatter, errors), (cdf, system) = axes
    recorded, simulated = pairs[0]
    figure.suptitle(f"recorded: {recorded.label};  against {simulated.label}", x=0.01, ha="left")
    low, high = np.inf, 0.0
    for name, (column, colour, marker) in LATENCIES.items():
        sides = [np.concatenate([_latency_s(pair[i], column) for pair in pairs]) for i in (0, 1)]
        if np.isnan(sides[0]).any():
            continue
        scatter.plot(*sides, linestyle="", marker=marker, markersize=3, alpha=0.5, color=colour, label=name)
        low, high = min(low, *map(np.min, sides)), max(high, *map(np.max, sides))
        for values, line, side in zip(sides, ("-", "--"), ("recorded", "simulated"), strict=True):
            share = np.arange(1, len(values) + 1) / len(values)
            cdf.plot(np.sort(values), share, color=colour, linestyle=line, label=f"{name}, {side}")
    span = np.array([low * 0.9, high * 1.1])
    scatter.plot(span, span, color="black", linewidth=0.8)
    scatter.fill_between(span, span * (1 - tolerance), span * (1 + tolerance), color="black", alpha=0.1, linewidth=0)
    scatter.set(xscale="log", yscale="log", xlim=span, ylim=span)
    scatter.set_xlabel("recorded latency (s)")
    scatter.set_ylabel("simulated latency (s)")
    scatter.set_title(f"one point a request; grey: within {tolerance:.0%}")
    scatter.legend(fontsize=8, frameon=False, loc="upper left")
    cdf.set(xscale="log", ylim=(0, 1.02), xlabel="latency (s)", ylabel="share of requests")
    cdf.legend(fontsize=8, frameon=False, loc="lower right" if len(cdf.lines) < 3 else "best")
    system.step(*_in_system(recorded), where="post", color="black", linewidth=1.3, label="recorded")
    look = {"color": "#D55E00", "linestyle": "--", "linewidth": 1.3}
    system.step(*_in_system(simulated), where="post", label="simulated", **look)
    system.set_xlabel("time from the first arrival (s)")
    system.set_ylabel("requests in the system")
    system.set_ylim(bottom=0)
    system.legend(fontsize=8, frameon=False, loc="best")
    _error_panel(errors, rows, tolerance)
    for scale in (scatter.xaxis, scatter.yaxis, cdf.xaxis):
        scale.set_major_locator(LogLocator(subs=(1, 2, 5) if span[1] < 100 * span[0] else (1,)))
        scale.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        scale.set_minor_formatter(NullFormatter())
    return figure


def _error_panel(axis: Any, rows: Sequence[Comparison], tolerance: float) -> None:
    """One line a metric, errors beyond +-100 % at the edge with their number."""
    known = [row for row in rows if row.error is not None]
    for place, row in enumerate(known):
        assert row.error is not None
        error = min(max(row.error, -MAX_ERROR), MAX_ERROR)
        colour = VERDICT_COLOURS.get(row.verdict, "#CC79A7")
        noise = row.noise if row.noise is not None and row.noise == row.noise else None
        axis.errorbar(error, place, xerr=noise, color=colour, marker="o", markersize=4, capsize=2, linewidth=1.2)
        if error != row.error:
            axis.annotate(f"{row.error:+.0%}", (error, place), (-6, 0), textcoords="offset points", fontsize=7,
                          ha="right", va="center")  # fmt: skip
    widest = max([2 * tolerance, *(min(abs(row.error or 0), MAX_ERROR) + (row.noise or 0) for row in known)])
    axis.axvspan(-tolerance, tolerance, color="black", alpha=0.1, linewidth=0)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlim(-widest * 1.1, widest * 1.1)
    axis.set_yticks(range(len(known)), [METRICS[row.metric].label for row in known], fontsize=8)
    axis.invert_yaxis()
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if widest > 0.2 else 1))
    axis.set_xlabel("error of the simulation")
    words = sorted({row.verdict for row in known}, key=lambda w: [*VERDICT_COLOURS, "LESS", "MORE"].index(w))
    handles = [
        plt.Line2D([], [], linestyle="", marker="o", color=VERDICT_COLOURS.get(w, "#CC79A7"), label=w) for w in words
    ]
    axis.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(words))
    axis.grid(alpha=0.25, axis="x")
    axis.spines[["top", "right"]].set_visible(False)


def _latency_s(run: Recording, column: str) -> Any:
    """From arrival, per measured request in order of ids; NaN where it was not observed."""
    ids, ends, arrivals = (np.array(run.requests[name], float) for name in ("request_id", column, "arrival_ns"))
    measured = np.array(run.requests["measured"], bool)
    return (ends - arrivals)[measured][np.argsort(ids[measured])] * 1e-9


def _in_system(run: Recording) -> tuple[Any, Any]:
    """Times in seconds, and how many requests had arrived and not finished from then on."""
    arrivals, ends = (np.array(run.requests[name], float) for name in ("arrival_ns", "finish_ns"))
    times, places = np.unique(np.concatenate([arrivals, ends]), return_inverse=True)
    change = np.zeros(len(times))
    np.add.at(change, places, np.repeat([1.0, -1.0], len(arrivals)))
    return (times - arrivals.min()) * 1e-9, np.cumsum(change)
