"""Static, dynamic and continuous batching: latency against arrival rate, the knee, and the rate each one sustains.

Normalized latency is the mean over requests of the end-to-end latency over the output tokens (Orca; vLLM). The knee is
where Kleinrock's power, the arrival rate over that latency, is largest (Kleinrock, "Power and Deterministic Rules of
Thumb for Probabilistic Problems in Computer Communications", ICC 1979): there one per cent more load begins to cost
more than one per cent more latency. It is taken where the power first falls, so that it depends neither on where the
rates end, nor on the latency of a finite trace, which stops rising once everything queues. Schedulers are compared by
one bound for all: the highest rate whose normalized latency is at most SUSTAINED times the lowest of the workload.
Both are found run by run (seed and repeat), and told with their range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, NullLocator

from uvm_kv.report.repeats import REPEATS, medians, one_of_each
from uvm_kv.report.style import PAGE_IN, SPARE
from uvm_kv.study.base import Drawn, Study
from uvm_kv.study.kit import percent, served

SUSTAINED = 3.0
LATENCY, TTFT, TPOT = "normalized_latency_s.mean", "ttft_s.p50", "tpot_s.p99"
PANELS = {
    LATENCY: ("mean normalized latency\n(ms a token)", 1e3),
    TTFT: ("median TTFT (s)", 1.0),
    TPOT: ("p99 TPOT (ms)", 1e3),
}
KEY = ("workload", "batching", "request_rate")
RUN = ["seed", "repeat"]
"""What tells the curves of one scheduler apart: each is one draw of lengths and arrivals at all rates."""
ALIKE = ("model", "hardware", "origin", "engine", "mechanism", "offered_batch")
COLUMNS = (
    *("model", "hardware", *KEY, "num_runs", *(f"{m}{end}" for m in PANELS for end in ("", "_low", "_high"))),
    *("normalized_latency_s.p50", "normalized_latency_s.p99", "tpot_s.p50", "running_batch_mean"),
    *("output_tokens_per_s_whole_run", "knee_rate", "knee_rate_low", "knee_rate_high", "knee_latency_s"),
    *("sustained_rate", "sustained_rate_low", "sustained_rate_high"),
)
CHUNKED, WHOLE = "continuous (chunked prefill)", "continuous (whole prefills)"
_LOOKS = ((SPARE[7], "-", "o"), (SPARE[1], "--", "v"), (SPARE[3], "--", "^"), (SPARE[6], "--", "h"))
_CONTINUOUS = {WHOLE: (SPARE[0], "-", "s"), CHUNKED: (SPARE[2], "-", "D")}


def draw(runs: pd.DataFrame, failures: Sequence[dict[str, Any]]) -> Drawn:
    """A column a workload; normalized latency, TTFT and TPOT against the arrival rate."""
    del failures
    usable = _usable(runs)
    table = _table(usable)
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
                rates = line["request_rate"]
                shown[name] = axis.plot(rates, line[metric] * scale, color=colour, linestyle=style, marker=marker)[0]
                if line["num_runs"].max() > 1:
                    low, high = line[f"{metric}_low"] * scale, line[f"{metric}_high"] * scale
                    axis.fill_between(rates, low, high, color=colour, alpha=0.18, linewidth=0)
                if metric == LATENCY and np.isfinite(line["knee_rate"].iloc[0]):
                    shown["knee"] = axis.plot(
                        line["knee_rate"].iloc[0], line["knee_latency_s"].iloc[0] * scale, marker="o", markersize=8,
                        linestyle="", color=colour, markerfacecolor="none", zorder=4,
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
        column[-1].set_xticks(rates, [f"{r:g}" for r in rates], rotation=45)
        column[-1].xaxis.set_minor_locator(NullLocator())
        column[-1].set_xlabel("arrival rate (requests/s)")
    told = {"knee": "knee (rate over latency is largest)", "bound": f"{SUSTAINED:g} times the lowest latency"}
    order = [name for name in (*names, *told) if name in shown]
    num_runs = int(table["num_runs"].max())
    title = f"lines: medians of {num_runs} runs (draws of lengths and arrivals); bands: their range"
    figure.legend(
        [shown[n] for n in order],
        [told.get(n, n) for n in order],
        loc="outside upper center",
        ncols=3,
        title=title if num_runs > 1 else None,
    )
    return Drawn(figure, table[list(COLUMNS)], _claims(table, usable))


def _usable(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs with an arrival rate, each with the name of its scheduler; ValueError where they are not to be compared."""
    usable = runs[runs["arrival"] == "poisson"].copy() if "arrival" in runs else runs.iloc[:0]
    if usable.empty:
        raise ValueError("batching: no run with workload.arrival=poisson: there is no arrival rate to draw against")
    if LATENCY not in usable or usable[LATENCY].isna().any():
        raise ValueError("batching: runs without a normalized latency; run them again with this version")
    usable["request_rate"] = usable["request_rate"].astype(float)
    usable["batching"] = [_batching(run) for _, run in usable.iterrows()]
    for name in RUN:
        usable[name] = usable.get(name, 0)
    for workload, part in usable.groupby("workload", sort=True):
        one_of_each(part, [name for name in ALIKE if name in part], f"batching, {workload}")
        for _, curve in part.groupby("batching", sort=True):
            _check_alike(curve, ("workload.request_rate",), f"batching, {workload}")
        _check_alike(part, ("workload.request_rate", "memory.device_kv_bytes"), f"batching, {workload}", "scheduler.")
    return usable


def _check_alike(part: pd.DataFrame, free: Sequence[str], study: str, free_group: str | None = None) -> None:
    """ValueError where the runs differ in a setting that is not free: those of a curve in nothing but the rate, and
    curves in their scheduler, and in what its largest step leaves of the card for KV."""
    details = [run["setting"] | run["variant"] for _, run in part.iterrows()]
    names = dict.fromkeys(name for detail in details for name in detail if name not in free)
    told = [name for name in names if not (free_group and name.startswith(free_group))]
    if differing := [name for name in told if len({repr(detail.get(name)) for detail in details}) > 1]:
        raise ValueError(f"{study}: runs differ in {', '.join(differing)}; one setting is compared at a time")


def _table(usable: pd.DataFrame) -> pd.DataFrame:
    """A row a workload, scheduler and rate: medians over seeds and repeats, with the least and the largest of them."""
    try:
        table = medians(usable, KEY, keep=tuple(PANELS)).sort_values(list(KEY)).reset_index(drop=True)
    except ValueError as error:
        raise ValueError(f"batching: {error}") from None
    for metric in PANELS:
        for end, at in (("_low", 0), ("_high", -1)):
            table[metric + end] = [repeats[at] for repeats in table[f"{metric}{REPEATS}"]]
    table = table.copy()  # In one piece: pandas warns of a frame that grew column by column.
    parts = []
    for (workload, name), part in table.groupby(["workload", "batching"], sort=True):
        bound = _bound(table[table["workload"] == workload])
        curves = [
            (curve["request_rate"].tolist(), curve[LATENCY].astype(float).tolist())
            for _, curve in usable[(usable["workload"] == workload) & (usable["batching"] == name)]
            .sort_values("request_rate")
            .groupby(RUN, sort=True)
        ]
        found = {
            "knee_rate": sorted(knee(*curve) for curve in curves),
            "sustained_rate": sorted(sustained(*curve, bound) for curve in curves),
        }
        for column, rates in found.items():
            part = part.assign(**{column: _median(rates), f"{column}_low": rates[0], f"{column}_high": rates[-1]})
        found_at = float(part["knee_rate"].iloc[0])
        at_knee = float(np.interp(found_at, part["request_rate"], part[LATENCY]))
        parts.append(part.assign(knee_latency_s=at_knee if np.isfinite(found_at) else np.nan))
    return pd.concat(parts, ignore_index=True)


def _median(ascending: Sequence[float]) -> float:
    """Of two in the middle the lower one, so that it is one that was found, also among infinite ones."""
    return ascending[(len(ascending) - 1) // 2]


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


def knee(rates: Sequence[float], latency: Sequence[float]) -> float:
    """The first of the ascending rates beyond which the power, rate over latency, falls. -inf where that is the first
    of all: the knee lies there or before; inf where it does not fall: the knee has not come by the last rate."""
    power = np.asarray(rates, float) / np.asarray(latency, float)
    falls = np.flatnonzero(np.diff(power) < 0)
    if not len(falls):
        return float("inf")
    return float(rates[falls[0]]) if falls[0] else float("-inf")


def sustained(rates: Sequence[float], latency: Sequence[float], bound: float) -> float:
    """The highest rate with a latency of at most `bound`: from the first that has it up to the first beyond that has
    not, interpolated between the two linearly in the logarithms. The last rate where no later one exceeds the bound, 0
    where none is within it."""
    x, y = np.asarray(rates, float), np.asarray(latency, float)
    within = np.flatnonzero(y <= bound)
    if not len(within):
        return 0.0
    beyond = np.flatnonzero(y[within[0] :] > bound)
    if not len(beyond):
        return float(x[-1])
    i = int(within[0] + beyond[0])
    (x0, x1), (y0, y1) = np.log(x[i - 1 : i + 1]), np.log(y[i - 1 : i + 1])
    return float(np.exp(x0 + (np.log(bound) - y0) * (x1 - x0) / (y1 - y0)))


def _claims(table: pd.DataFrame, usable: pd.DataFrame) -> list[str]:
    claims = []
    for workload, part in table.groupby("workload", sort=True):
        title = f"{part['model'].iloc[0]}, {workload}"
        curves = part.groupby("batching", sort=False).first()
        curves = curves.loc[sorted(curves.index, key=lambda name: _rank(str(name)))]
        rates = sorted(part["request_rate"].unique())
        runs = usable[usable["workload"] == workload]
        limit = f"{served(runs, ['output'])}, at most {runs['offered_batch'].max():.0f} at a time"
        claims.append(_sustained(title, curves, _bound(part), rates[-1], len(runs.groupby(RUN)), limit))
        claims.append(_knees(title, curves, rates))
        claims += _chunked(title, part, runs)
    return claims


def _knees(title: str, curves: pd.DataFrame, rates: Sequence[float]) -> str:
    def say(rate: float) -> str:
        return f"{rate:g}" if np.isfinite(rate) else f"beyond {rates[-1]:g}" if rate > 0 else f"up to {rates[0]:g}"

    each = "; ".join(f"{name} {_with_range(row, 'knee_rate', say)}" for name, row in curves.iterrows())
    tried = ", ".join(f"{rate:g}" for rate in rates)
    return (
        f"{title}: the knee, where arrival rate over mean normalized latency is largest, lies at these requests/s "
        f"(of {tried}): {each}."
    )


def _with_range(row: pd.Series[Any], column: str, say: Callable[[float], str]) -> str:
    """The median, and the range over runs where it has one."""
    at, low, high = (say(row[f"{column}{end}"]) for end in ("", "_low", "_high"))
    return at if low == high else f"{at} ({low} to {high})"


def _sustained(title: str, curves: pd.DataFrame, bound: float, top: float, num_runs: int, scope: str) -> str:
    """`scope`: what was served, and under which limit of the batch."""

    def say(rate: float) -> str:
        return "none" if not rate else format(rate, ".3g") + (" and more" if rate >= top else "")

    each = "; ".join(f"{name} {_with_range(row, 'sustained_rate', say)}" for name, row in curves.iterrows())
    of = f" (medians of {num_runs} runs, and their range)" if num_runs > 1 else ""
    line = (
        f"{title}: requests/s with a mean normalized latency of at most {1e3 * bound:.3g} ms a token, {SUSTAINED:g} "
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
        few = f", of {max(1, round(0.01 * runs['num_measured_requests'].median()))} requests a run"
    return [
        f"{title}, {rates[-1]:g} requests/s: chunked prefill {word} ({tpot}{few}), with {ttft} median TTFT "
        f"and {latency} mean normalized latency."
    ]


def _change(changes: pd.Series[float]) -> str:
    text = percent(float(changes.median()))
    if percent(float(changes.min())) == percent(float(changes.max())):
        return text
    return f"{text}, {percent(float(changes.min()))} to {percent(float(changes.max()))}"


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
