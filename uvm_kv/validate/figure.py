"""The figure of simulated against recorded runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, PercentFormatter

from uvm_kv.report.drawing import handle, line_look, plain_numbers
from uvm_kv.report.style import PAGE_IN
from uvm_kv.validate.comparison import METRICS, Comparison
from uvm_kv.validate.recorded import Recording

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
    scatter.set(xlabel="recorded latency (s)", ylabel="simulated latency (s)")
    scatter.set_title(f"one point per request; grey: within {tolerance:.0%}")
    scatter.legend(fontsize=8, loc="upper left")
    cdf.set(xscale="log", ylim=(0, 1.02), xlabel="latency (s)", ylabel="share of requests")
    cdf.legend(fontsize=8, loc="lower right" if len(cdf.lines) < 3 else "best")
    system.step(*_in_system(recorded), where="post", color="black", linewidth=1.3, label="recorded")
    look = {"color": "#D55E00", "linestyle": "--", "linewidth": 1.3}
    system.step(*_in_system(simulated), where="post", label="simulated", **look)
    system.set(xlabel="time from the first arrival (s)", ylabel="requests in the system")
    system.set_ylim(bottom=0)
    system.legend(fontsize=8, loc="best")
    _error_panel(errors, rows, tolerance)
    for scale in (scatter.xaxis, scatter.yaxis, cdf.xaxis):
        scale.set_major_locator(LogLocator(subs=(1, 2, 5) if span[1] < 100 * span[0] else (1,)))
        plain_numbers(scale)
    return figure


def _error_panel(axis: Any, rows: Sequence[Comparison], tolerance: float) -> None:
    """One line per metric, errors beyond +-100 % at the edge with their number."""
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
    handles = [handle(word, **line_look(VERDICT_COLOURS.get(word, "#CC79A7"), "", "o")) for word in words]
    axis.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(words))


def _latency_s(run: Recording, column: str) -> Any:
    """Latency from arrival of each measured request, in order of ids; NaN where it was not observed."""
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
