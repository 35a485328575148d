"""Static, dynamic and continuous batching: latency against arrival rate, and what load each one sustains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from uvm_kv.report.drawing import Look, handle, line_look, log_scale, log_ticks
from uvm_kv.report.style import PAGE_IN, SPARE
from uvm_kv.study.base import Drawn, Study
from uvm_kv.study.batching_rates import (
    CHUNKED,
    KEY,
    LATENCY,
    RANGE,
    RUN,
    SUSTAINED,
    TPOT,
    TTFT,
    WHOLE,
    bound_of,
    rank,
    rates_table,
    usable_runs,
)
from uvm_kv.study.kit import panel_title, percent, served, span

PANELS = {
    LATENCY: ("mean normalized latency\n(ms per token)", 1e3),
    TTFT: ("median TTFT (s)", 1.0),
    TPOT: ("p99 TPOT (ms)", 1e3),
}
COLUMNS = ["model", "hardware", *KEY, "num_runs", *(f"{m}{end}" for m in PANELS for end in RANGE),
           "normalized_latency_s.p50", "normalized_latency_s.p99", "tpot_s.p50", "running_batch_mean",
           "output_tokens_per_s_whole_run", *(f"knee_rate{end}" for end in RANGE), "knee_latency_s",
           *(f"sustained_rate{end}" for end in RANGE)]  # fmt: skip
CONTINUOUS = {WHOLE: line_look(SPARE[0], "-", "s"), CHUNKED: line_look(SPARE[2], "-", "D")}
OTHERS = [line_look(SPARE[7], "-", "o"), line_look(SPARE[1], "--", "v"), line_look(SPARE[3], "--", "^"),
          line_look(SPARE[6], "--", "h")]  # fmt: skip
KNEE: Look = {"marker": "o", "markersize": 8, "linestyle": "", "markerfacecolor": "none", "zorder": 4}
BOUND: Look = {"color": "black", "linewidth": 0.7, "linestyle": (0, (4, 3)), "zorder": 0}


def draw(runs: pd.DataFrame, _: Sequence[dict[str, Any]]) -> Drawn:
    """A column per workload; normalized latency, TTFT and TPOT against the arrival rate."""
    usable = usable_runs(runs)
    table = rates_table(usable)
    names = sorted(table["batching"].unique(), key=rank)
    others = [name for name in names if name not in CONTINUOUS]
    dashed = {name: OTHERS[min(i, len(OTHERS) - 1)] for i, name in enumerate(others)}
    looks = {name: (CONTINUOUS | dashed)[name] for name in names}
    parts = [part for _, part in table.groupby("workload", sort=True)]
    size = (PAGE_IN, 1.5 * len(PANELS) + 0.9)
    figure, axes = plt.subplots(len(PANELS), len(parts), figsize=size, squeeze=False, sharex="col")
    for column, part in zip(axes.T, parts, strict=True):
        column[0].set_title(f"{panel_title(part)}, {part['workload'].iloc[0]}")
        for axis, metric in zip(column, PANELS, strict=True):
            _draw_metric(axis, part, metric, looks)
        log_ticks(column[-1].xaxis, sorted(part["request_rate"].unique()), rotation=45)
        column[-1].set_xlabel("arrival rate (requests/s)")
    handles = [handle(name, **look) for name, look in looks.items()]
    if np.isfinite(table["knee_rate"]).any():
        handles.append(handle("knee (rate over latency is largest)", color="black", **KNEE))
    handles.append(handle(f"{SUSTAINED:g} times the lowest latency", **BOUND))
    num_runs = int(table["num_runs"].max())
    title = f"lines: medians of {num_runs} runs (draws of lengths and arrivals); bands: their range"
    figure.legend(handles=handles, loc="outside upper center", ncols=3, title=title if num_runs > 1 else None)
    return Drawn(figure, table[COLUMNS], _claims(table, usable))


def _draw_metric(axis: Any, part: pd.DataFrame, metric: str, looks: dict[str, Look]) -> None:
    label, scale = PANELS[metric]
    for name, look in looks.items():
        if (line := part[part["batching"] == name]).empty:
            continue
        axis.plot(line["request_rate"], line[metric] * scale, **look)
        if line["num_runs"].max() > 1:
            low, high = line[f"{metric}_low"] * scale, line[f"{metric}_high"] * scale
            axis.fill_between(line["request_rate"], low, high, color=look["color"], alpha=0.18, linewidth=0)
        knee_rate, at_knee = line["knee_rate"].iloc[0], line["knee_latency_s"].iloc[0]
        if metric == LATENCY and np.isfinite(knee_rate):
            axis.plot(knee_rate, at_knee * scale, color=look["color"], **KNEE)
    if metric == LATENCY:
        axis.axhline(bound_of(part) * scale, **BOUND)
    log_scale(axis.yaxis, minor="3")
    axis.set_ylabel(label)


def _claims(table: pd.DataFrame, usable: pd.DataFrame) -> list[str]:
    claims = []
    for workload, part in table.groupby("workload", sort=True):
        title = f"{part['model'].iloc[0]}, {workload}"
        curves = part.groupby("batching", sort=False).first()
        curves = curves.loc[sorted(curves.index, key=lambda name: rank(str(name)))]
        rates = sorted(part["request_rate"].unique())
        runs = usable[usable["workload"] == workload]
        limit = f"{served(runs, ['output'])}, at most {runs['offered_batch'].max():.0f} at a time"
        claims.append(_sustained(title, curves, bound_of(part), rates[-1], len(runs.groupby(RUN)), limit))
        claims.append(
            f"{title}: the knee, where arrival rate over mean normalized latency is largest, lies at these requests/s "
            f"(of {', '.join(f'{rate:g}' for rate in rates)}): {_each_knee(curves, rates)}."
        )
        claims += _chunked(title, part, runs)
    return claims


def _each_knee(curves: pd.DataFrame, rates: Sequence[float]) -> str:
    def say(rate: float) -> str:
        return f"{rate:g}" if np.isfinite(rate) else f"beyond {rates[-1]:g}" if rate > 0 else f"up to {rates[0]:g}"

    return "; ".join(f"{name} {_with_range(row, 'knee_rate', say)}" for name, row in curves.iterrows())


def _with_range(row: pd.Series[Any], column: str, say: Callable[[float], str]) -> str:
    """The median, and the range over runs where it has one."""
    at, low, high = (say(row[f"{column}{end}"]) for end in RANGE)
    return at if low == high else f"{at} ({low} to {high})"


def _sustained(title: str, curves: pd.DataFrame, bound: float, top: float, num_runs: int, scope: str) -> str:
    """`scope`: what was served, and under which limit of the batch."""

    def say(rate: float) -> str:
        return "none" if not rate else format(rate, ".3g") + (" and more" if rate >= top else "")

    each = "; ".join(f"{name} {_with_range(row, 'sustained_rate', say)}" for name, row in curves.iterrows())
    of = f" (medians of {num_runs} runs, and their range)" if num_runs > 1 else ""
    line = (
        f"{title}: requests/s with a mean normalized latency of at most {1e3 * bound:.3g} ms per token, {SUSTAINED:g} "
        f"times the lowest{of}, {scope}: {each}"
    )
    rates, is_continuous = curves["sustained_rate"], curves.index.str.startswith("continuous")
    best, other = rates[is_continuous].max(), rates[~is_continuous].max()
    if not best > 0 or not other > 0:
        who = "Only continuous batching" if best > 0 else "Only the others" if other > 0 else "No scheduler"
        return f"{line}. {who} keeps it."
    beats = "sustains" if best >= other else "sustains only"
    return f"{line}. Continuous batching {beats} {best / other:.3g} times the rate of the best of the others."


def _chunked(title: str, part: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """What cutting prefills does, at the highest rate that both sustain, run by run."""
    both = part[part["batching"].isin((CHUNKED, WHOLE))]
    if both["batching"].nunique() < 2:
        return []
    reach = both.groupby("batching")["sustained_rate"].first().min()
    common = set.intersection(*(set(p["request_rate"]) for _, p in both.groupby("batching")))
    rates = sorted(rate for rate in common if rate <= reach)
    if not rates:
        return [f"{title}: no rate is sustained with chunked and with whole prefills."]
    metrics = [TPOT, TTFT, LATENCY]
    at = runs[runs["request_rate"] == rates[-1]].set_index(["batching", *RUN])[metrics].astype(float)
    change = (at.loc[CHUNKED] / at.loc[WHOLE] - 1).dropna()
    if change.empty:
        return []
    lower, n = int((change[TPOT] < 0).sum()), len(change)
    word = "lowers p99 TPOT" if lower else "does not lower p99 TPOT"
    if 0 < lower < n:
        word += f" in {lower} of {n} runs"
    tpot, ttft, latency = (_change(change[metric]) for metric in metrics)
    few = ""
    if "num_measured_requests" in runs:
        few = f", of {max(1, round(0.01 * runs['num_measured_requests'].median()))} requests per run"
    return [
        f"{title}, {rates[-1]:g} requests/s: chunked prefill {word} ({tpot}{few}), with {ttft} median TTFT "
        f"and {latency} mean normalized latency."
    ]


def _change(changes: pd.Series[float]) -> str:
    text, ends = percent(float(changes.median())), span(changes, percent)
    return f"{text}, {ends}" if " to " in ends else text


STUDY = Study(
    name="batching",
    title="Batching: latency against arrival rate",
    question="What load can the card take under static, dynamic and continuous batching, with chunked prefill or not?",
    how_to_read=(
        "Requests arrive at random (Poisson). Upper row: the time a request takes, arrival to last token, for each "
        "token that it gets, in the mean over requests; circles mark the knee, where one per cent more load begins to "
        "cost more than one per cent more latency (rate over latency is largest). "
        "Static batching waits for a full batch, so that it is slow at low rates too; dynamic batching waits no longer "
        "than its window; continuous batching takes a request in at the next step. The dashed line is three times the "
        "lowest latency: where a curve crosses it is the load that the scheduler sustains. Middle: the time to the "
        "first token. Below: the mean token gap of the slowest one per cent of requests, which long prefills in the "
        "same step stretch; of a few hundred requests that is a few. Lines are medians over runs with other draws of "
        "lengths and arrivals, bands reach from the least to the largest of them, and a knee is one of the rates tried."
    ),
    factors=("model", "workload", "scheduler", "window_s", "chunked_prefill", "request_rate", "seed"),
    draw=draw,
)
