"""Static, dynamic and continuous batching: latency against arrival rate, the knee, and the rate each one sustains.

Normalized latency is a request's end-to-end latency over its output tokens (Orca; vLLM). The knee of a curve is found
by Kneedle (Satopaa, Albrecht, Irwin, Raghavan, "Finding a 'Kneedle' in a Haystack", ICDCS workshops 2011): with both
axes scaled to 0..1, the point that lies farthest below the chord; a curve that first falls (a batch that waits to be
filled) is taken from its lowest point on. Schedulers are compared by one bound for all: the highest rate whose median
normalized latency is at most SUSTAINED times the lowest of the workload.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, NullLocator

from uvm_kv.analysis.study.base import Drawn, Study, percent
from uvm_kv.analysis.style import PAGE_IN, SPARE

SUSTAINED = 3.0
RISES = 1.5
"""A curve that rises by less, from its lowest point to its last, has no knee in the range."""
MIN_POINTS = 3
LATENCY = "normalized_latency_s.p50"
PANELS = {
    LATENCY: ("median normalized latency\n(ms a token)", 1e3),
    "ttft_s.p50": ("median TTFT (s)", 1.0),
    "tpot_s.p99": ("p99 TPOT (ms)", 1e3),
}
COLUMNS = (
    *("model", "hardware", "workload", "batching", "request_rate", LATENCY, "normalized_latency_s.p99", "ttft_s.p50"),
    *("tpot_s.p50", "tpot_s.p99", "running_batch_mean", "output_tokens_per_s_whole_run", "is_knee"),
    *("knee_rate", "sustained_rate"),
)
CHUNKED, WHOLE = "continuous (chunked prefill)", "continuous (whole prefills)"
_LOOKS = ((SPARE[7], "-", "o"), (SPARE[1], "--", "v"), (SPARE[3], "--", "^"), (SPARE[6], "--", "h"))
_CONTINUOUS = {WHOLE: (SPARE[0], "-", "s"), CHUNKED: (SPARE[2], "-", "D")}


def draw(runs: pd.DataFrame, failures: Sequence[dict[str, Any]]) -> Drawn:
    """A column a workload; normalized latency, TTFT and TPOT against the arrival rate."""
    del failures
    table = _table(runs)
    workloads = sorted(table["workload"].unique())
    names = sorted(table["batching"].unique(), key=_rank)
    figure, axes = plt.subplots(
        len(PANELS), len(workloads), figsize=(PAGE_IN, 1.5 * len(PANELS) + 0.9), squeeze=False, sharex="col"
    )
    looks = _looks(names)
    shown: dict[str, Any] = {}
    for column, workload in zip(axes.T, workloads, strict=True):
        part = table[table["workload"] == workload]
        column[0].set_title(f"{part['model'].iloc[0]} on {part['hardware'].iloc[0]}, {workload}")
        for axis, (metric, (label, scale)) in zip(column, PANELS.items(), strict=True):
            for name in names:
                line = part[part["batching"] == name]
                colour, style, marker = looks[name]
                shown[name] = axis.plot(
                    line["request_rate"], line[metric] * scale, color=colour, linestyle=style, marker=marker
                )[0]
                knee = line[line["is_knee"]]
                if metric == LATENCY and len(knee):
                    shown["knee"] = axis.plot(
                        knee["request_rate"], knee[metric] * scale, marker="o", markersize=8, linestyle="",
                        color=colour, markerfacecolor="none", zorder=4,
                    )[0]  # fmt: skip
            if metric == LATENCY:
                bound = _bound(part) * scale
                shown["bound"] = axis.axhline(bound, color="black", linewidth=0.7, linestyle=(0, (4, 3)), zorder=0)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axis.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:g}" if f"{v:e}"[0] == "3" else ""))
            axis.set_ylabel(label)
        rates = sorted(part["request_rate"].unique())
        column[-1].set_xscale("log", base=2)
        column[-1].set_xticks(rates, [f"{r:g}" for r in rates])
        column[-1].xaxis.set_minor_locator(NullLocator())
        column[-1].set_xlabel("arrival rate (requests/s)")
    told = {"knee": "knee (Kneedle)", "bound": f"{SUSTAINED:g} times the lowest latency"}
    order = [name for name in (*names, *told) if name in shown]
    figure.legend([shown[n] for n in order], [told.get(n, n) for n in order], loc="outside upper center", ncols=3)
    return Drawn(figure, table[list(COLUMNS)], _claims(table))


def _table(runs: pd.DataFrame) -> pd.DataFrame:
    usable = runs[runs["arrival"] == "poisson"].copy() if "arrival" in runs else runs.iloc[:0]
    if usable.empty:
        raise ValueError("batching: no run with workload.arrival=poisson: there is no arrival rate to draw against")
    if LATENCY not in usable or usable[LATENCY].isna().any():
        raise ValueError("batching: runs without a normalized latency; run them again with this version")
    numbers = [c for c in COLUMNS if c in usable and c not in ("model", "hardware", "workload", "batching")]
    usable[numbers] = usable[numbers].astype(float)
    usable["batching"] = [_batching(run) for _, run in usable.iterrows()]
    key = ["model", "workload", "batching", "request_rate"]
    if usable.duplicated(key).any():
        twice = usable[usable.duplicated(key)].iloc[0]
        raise ValueError(
            f"batching: several runs of {twice['batching']} at {twice['request_rate']:g} requests/s of "
            f"{twice['workload']}; they must differ in nothing else"
        )
    usable = usable.sort_values(key).reset_index(drop=True)
    if usable.groupby("workload")["model"].nunique().max() > 1:
        raise ValueError("batching: runs of several models at one workload; give those of one")
    parts = []
    for _, part in usable.groupby(["workload", "batching"], sort=True):
        bound = _bound(usable[usable["workload"] == part["workload"].iloc[0]])
        rates, latency = part["request_rate"].tolist(), part[LATENCY].tolist()
        at = knee(rates, latency)
        parts.append(
            part.assign(
                knee_rate=np.nan if at is None else at,
                is_knee=part["request_rate"] == at,
                sustained_rate=sustained(rates, latency, bound),
            )
        )
    return pd.concat(parts, ignore_index=True)


def _batching(run: pd.Series[Any]) -> str:
    """The scheduler with its window, and whether prefills are cut."""
    details = run["setting"] | run["variant"]
    if run["scheduler"] == "continuous":
        return CHUNKED if details.get("scheduler.chunked_prefill", True) else WHOLE
    if run["scheduler"] == "dynamic":
        return f"dynamic ({details['scheduler.window_s']:g} s)"
    return str(run["scheduler"])


def _rank(name: str) -> tuple[int, float, str]:
    order = ("static", "dynamic", "continuous")
    first, _, rest = name.partition(" (")
    return order.index(first) if first in order else len(order), float(rest[:-3]) if first == "dynamic" else 0.0, name


def _looks(names: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    others = iter(_LOOKS)
    return {name: _CONTINUOUS[name] if name in _CONTINUOUS else next(others, _LOOKS[-1]) for name in names}


def _bound(part: pd.DataFrame) -> float:
    return SUSTAINED * float(part[LATENCY].min())


def knee(rates: Sequence[float], latency: Sequence[float]) -> float | None:
    """The rate at Kneedle's knee of a curve at ascending rates; None where it does not rise, rises from
    its first point on, or has too few points."""
    x, y = np.asarray(rates, float), np.asarray(latency, float)
    start = int(y.argmin())
    x, y = x[start:], y[start:]
    if len(x) < MIN_POINTS or y[-1] < RISES * y[0]:
        return None
    below = (x - x[0]) / (x[-1] - x[0]) - (y - y.min()) / np.ptp(y)
    return float(x[below.argmax()]) if below.max() > 0 else None


def sustained(rates: Sequence[float], latency: Sequence[float], bound: float) -> float:
    """The highest rate with a latency of at most `bound`, up to the first that exceeds it; between the two interpolated
    linearly in the logarithms. The last rate where all are within it, NaN where none is."""
    x, y = np.asarray(rates, float), np.asarray(latency, float)
    within = np.flatnonzero(y <= bound)
    if not len(within):
        return float("nan")
    last = int(within[-1])
    if last == len(x) - 1:
        return float(x[-1])
    (x0, x1), (y0, y1) = np.log(x[last : last + 2]), np.log(y[last : last + 2])
    return float(np.exp(x0 + (np.log(bound) - y0) * (x1 - x0) / (y1 - y0)))


def _claims(table: pd.DataFrame) -> list[str]:
    claims = []
    for workload, part in table.groupby("workload", sort=True):
        title = f"{part['model'].iloc[0]}, {workload}"
        curves = part.groupby("batching", sort=False).first()
        curves = curves.loc[sorted(curves.index, key=lambda name: _rank(str(name)))]
        top = float(part["request_rate"].max())
        knees = "; ".join(
            f"{name} {'none' if np.isnan(row['knee_rate']) else format(row['knee_rate'], 'g')}"
            for name, row in curves.iterrows()
        )
        claims.append(f"{title}: the knee (Kneedle) lies at these arrival rates, in requests/s: {knees}.")
        claims.append(_sustained(title, curves, _bound(part), top))
        claims += _chunked(title, part)
    return claims


def _sustained(title: str, curves: pd.DataFrame, bound: float, top: float) -> str:
    rates = curves["sustained_rate"]
    each = "; ".join(
        f"{name} {'none' if np.isnan(rate) else format(rate, '.3g') + (' and more' if rate >= top else '')}"
        for name, rate in rates.items()
    )
    line = f"{title}: requests/s with a median normalized latency of at most {1e3 * bound:.3g} ms a token: {each}"
    is_continuous = rates.index.str.startswith("continuous")
    best, other = rates[is_continuous].max(), rates[~is_continuous].max()
    if np.isnan(best) or np.isnan(other):
        who = "No scheduler" if np.isnan(best) and np.isnan(other) else "Only the others" if np.isnan(best) else ""
        return f"{line}. {who or 'Only continuous batching'} keeps it."
    beats = "sustains" if best >= other else "sustains only"
    return f"{line}. Continuous batching {beats} {best / other:.3g} times the rate of the best of the others."


def _chunked(title: str, part: pd.DataFrame) -> list[str]:
    """What cutting prefills does, at the highest rate that both sustain."""
    both = part[part["batching"].isin((CHUNKED, WHOLE))]
    if both["batching"].nunique() < 2:
        return []
    reach = both.groupby("batching")["sustained_rate"].first().min()
    common = set.intersection(*(set(p["request_rate"]) for _, p in both.groupby("batching")))
    rates = sorted(rate for rate in common if rate <= reach)
    if not rates:
        return [f"{title}: no rate is sustained with chunked and with whole prefills."]
    at = both[both["request_rate"] == rates[-1]].set_index("batching")
    change = {c: at.loc[CHUNKED, c] / at.loc[WHOLE, c] - 1 for c in ("tpot_s.p99", "ttft_s.p50", LATENCY)}
    word = "lowers" if change["tpot_s.p99"] < 0 else "does not lower"
    return [
        f"{title}, {rates[-1]:g} requests/s: chunked prefill {word} p99 TPOT ({percent(change['tpot_s.p99'])}), with "
        f"{percent(change['ttft_s.p50'])} median TTFT and {percent(change[LATENCY])} median normalized latency."
    ]


STUDY = Study(
    name="batching",
    title="Batching: latency against arrival rate",
    question="What load can the card take under static, dynamic and continuous batching, with chunked prefill or not?",
    how_to_read=(
        "Requests arrive at random (Poisson). Upper row: the time a request takes, arrival to last token, for each "
        "token that it gets, in the median; circles mark the knee, beyond which the queue grows while requests come. "
        "Static batching waits for a full batch, so that it is slow at low rates too; dynamic batching waits no longer "
        "than its window; continuous batching takes a request in at the next step. The dashed line is three times the "
        "lowest latency: where a curve crosses it is the load that the scheduler sustains. Middle: the time to the "
        "first token. Below: the mean token gap of the slowest one per cent of requests, which long prefills in the "
        "same step stretch."
    ),
    factors=("model", "workload", "scheduler", "request_rate"),
    draw=draw,
)
