"""Throughput, TPOT and running batch against offered batch, by mechanism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, NullFormatter

from uvm_kv.analysis.load import GROUP, points
from uvm_kv.analysis.study.base import Drawn, Study, percent
from uvm_kv.analysis.style import PAGE_IN, STYLES, look
from uvm_kv.analysis.verdict import BASELINES, Best, Verdict, verdicts, with_gains

PANELS = {
    "throughput": ("output tokens/s", 1.0),
    "tpot_s.p99": ("p99 TPOT (ms)", 1e3),
    "running_batch_mean": ("mean running batch", 1.0),
}
COLUMNS = (
    *("model", "workload", "label", "offered_batch", "throughput", "throughput_low", "throughput_high", "num_runs"),
    *("tpot_s.p50", "tpot_s.p99", "running_batch_mean", "gain", "gain_same_admission", "closed_form_ceiling"),
)


def draw(runs: pd.DataFrame, failures: Sequence[dict[str, Any]]) -> Drawn:
    """A row of panels a model and workload."""
    del failures
    table = with_gains(points(runs))
    groups = [part for _, part in table.groupby(GROUP, sort=True)]
    figure, axes = plt.subplots(len(groups), len(PANELS), figsize=(PAGE_IN, 1.65 * len(groups) + 0.6), squeeze=False)
    others = sorted(set(table["label"]) - set(STYLES))
    shown: dict[str, Any] = {}
    for row, part in zip(axes, groups, strict=True):
        for axis, (column, (label, scale)) in zip(row, PANELS.items(), strict=True):
            for name, lines in part.groupby("label", sort=True):
                lines = lines.sort_values("offered_batch")
                shown[str(name)] = axis.plot(
                    lines["offered_batch"], lines[column].astype(float) * scale, **look(str(name), others)
                )[0]
            axis.set_ylabel(label)
            _batch_axis(axis, part["offered_batch"])
        row[0].set_ylim(bottom=0)
        row[1].set_yscale("log")
        row[1].yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        row[1].yaxis.set_minor_formatter(NullFormatter())
        row[2].set_yscale("log", base=2)
        row[2].yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        _diagonal(row[2], part["offered_batch"])
        row[0].set_title(part["title"].iloc[0].partition(", on a ")[0])
    for axis in axes[-1]:
        axis.set_xlabel("offered batch (clients)")
    order = [m for m in (*STYLES, *others) if m in shown]
    figure.legend(
        [shown[m] for m in order],
        [f"{m} (baseline)" if m in BASELINES else m for m in order],
        loc="outside upper center",
        ncols=4,
    )
    drawn = table[[c for c in COLUMNS if c in table]].sort_values(["model", "workload", "label", "offered_batch"])
    found = verdicts(table)
    return Drawn(figure, drawn.reset_index(drop=True), [*_headline(table, found), *(v.line() for v in found)])


def _headline(table: pd.DataFrame, found: Sequence[Verdict]) -> list[str]:
    """One sentence over all comparisons; none where a side is absent from one of them."""
    known = [(v, v.challenger, v.gain) for v in found if v.challenger is not None and v.gain is not None]
    if len(known) < len(found) or not found:
        return []
    raised = [(v, c, gain) for v, c, gain in known if gain > v.noise]
    where = f"On a {table['origin'].iloc[0]} {table['title'].iloc[0].rpartition(' ')[2]}"

    def each(items: Sequence[tuple[Verdict, Best, float]]) -> str:
        return ", ".join(f"{v.title.partition(', on a ')[0]}: {percent(gain)} ({c.mechanism})" for v, c, gain in items)

    if not raised:
        return [f"{where}, CPU-backed KV raised the best throughput of none of {len(found)} workloads: {each(known)}."]
    equal = [v for v, _, _ in raised if v.gain_equal_tpot is not None and v.gain_equal_tpot > v.noise]
    return [
        f"{where}, CPU-backed KV raised the best throughput of {len(raised)} of {len(found)} workloads over the best "
        f"that the card does alone ({each(known)}); at equal p99 TPOT it did so in {len(equal)} of them."
    ]


def _batch_axis(axis: Any, batches: pd.Series[float]) -> None:
    axis.set_xscale("log", base=2)
    powers = [2**n for n in range(0, 24, 2) if batches.min() <= 2**n <= batches.max()]
    axis.set_xticks(powers, [str(b) for b in powers])
    axis.minorticks_off()


def _diagonal(axis: Any, batches: pd.Series[float]) -> None:
    """Where all clients run at once."""
    ends = np.array([batches.min(), batches.max()], float)
    axis.plot(ends, ends, color="black", linewidth=0.5, linestyle=(0, (1, 2)), zorder=0)


STUDY = Study(
    name="batch_sweep",
    title="Throughput, latency and running batch against the offered batch",
    question="Does CPU-backed KV raise the throughput of an RTX 3090, by how much, and by which mechanism?",
    how_to_read=(
        "Each line is a memory mechanism; the grey and the black one serve from the card alone. While all requests fit "
        "the card the lines lie on each other. To the right of that the card alone queues the rest (its running batch "
        "stays below the dotted diagonal), and the other mechanisms run more requests at once with a part of their KV "
        "cache in CPU memory. Where a line rises above the black and grey ones, that paid; where it falls, the link or "
        "the page faults cost more than the larger batch brings."
    ),
    factors=("model", "workload", "mechanism", "offered_batch"),
    draw=draw,
)
