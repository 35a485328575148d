"""Figures of a batch-size sweep, and of one run over time."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import PercentFormatter

from uvm_kv.report.drawing import (
    BATCH,
    batch_axis,
    comparison_rows,
    log_scale,
    mechanism_legend,
    mechanism_lines,
    without_look,
)
from uvm_kv.report.style import PAGE_IN, look

MAX_SPANS = 300


def sweep_figure(table: pd.DataFrame) -> Any:
    """One row of panels per group of comparable points; `table` as `with_gains` returns it."""
    figure, rows = comparison_rows(table, 3, height=2.1, margin=0.5, full_titles=True)
    others = without_look(table["label"])
    for part, axes in rows:
        _panels(axes, part, others)
    mechanism_legend(figure, table["label"], loc="outside lower center")
    return figure


def _panels(axes: Any, part: pd.DataFrame, others: list[str]) -> None:
    by_batch, gain, latency = axes
    mechanism_lines(by_batch, part, "offered_batch", "throughput", others)
    mechanism_lines(gain, part, "offered_batch", "gain_over_resident", others)
    for label, line in part.sort_values("offered_batch").groupby("label", sort=True):
        style = look(str(label), others)
        low, high = line["throughput"] - line["throughput_low"], line["throughput_high"] - line["throughput"]
        if low.notna().any():
            bars = {"fmt": "none", "ecolor": style["color"]}
            by_batch.errorbar(line["offered_batch"], line["throughput"], yerr=[low, high], **bars)
        latency.plot(line["tpot_s.p99"] * 1e3, line["throughput"], **style)
        bound = line["closed_form_ceiling"].astype(float)
        gain.plot(line["offered_batch"], bound, color=style["color"], linestyle=(0, (1, 2)), linewidth=1.0)
    for axis in (by_batch, gain):
        batch_axis(axis.xaxis, part["offered_batch"])
        axis.set_xlabel(BATCH)
    log_scale(latency.xaxis)  # Before the limits are set: without latencies those of a linear axis begin below 0.
    for axis in (by_batch, latency):
        axis.set_ylabel("output tokens per second")
        axis.set_ylim(bottom=0)
    gain.axhline(0, color="black", linewidth=0.8)
    ceiling = part["closed_form_ceiling"].astype(float).max()
    top = max(0.05, float(part["gain_over_resident"].max()), 0.0 if pd.isna(ceiling) else min(float(ceiling), 1.0))
    gain.set_ylim(-0.5, top * 1.25)
    gain.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    gain.set_ylabel("gain over device_resident")
    gain.set_title("dotted: closed-form ceiling of the reach;\ncut off at -50 %")
    latency.set_xlabel("p99 TPOT (ms)")
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
    sequences, kv, link, stalled = axes
    for name in ("running", "waiting"):
        sequences.plot(seconds, mean(f"num_{name}"), label=name)
    for name in ("claimed", "reserved", "used"):
        if f"kv_{name}_bytes" in observed:
            kv.plot(seconds, mean(f"kv_{name}_bytes") / 1e9, label=name)
    for direction in ("h2d", "d2h"):
        if names := [n for n in observed if n.startswith(f"{direction}_")]:
            link.plot(seconds, rate(*names) / 1e9, label=direction)
    if "stall_ns" in observed:
        stalled.plot(seconds, rate("stall_ns") * 1e-9, label="stall")
    for axis, label in zip(axes, ("sequences", "KV, GB", "link, GB/s", "share of time"), strict=True):
        axis.set_ylabel(label)
    stalled.set_xlabel("seconds")
    sequences.set_title(title)
    for axis in axes:
        axis.set_ylim(bottom=0)
        if axis.lines:
            axis.legend(loc="upper right")
    return figure
