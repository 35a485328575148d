"""Figures: of a batch-size sweep, and of one run over time."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from uvm_kv.report.load import GROUP
from uvm_kv.report.style import PAGE_IN, STYLES, style_of
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
