"""The knee of latency against arrival rate, and the rate that a scheduler sustains.

Normalized latency is the mean over requests of the end-to-end latency over the output tokens (Orca; vLLM). The knee is
where Kleinrock's power, the arrival rate over that latency, is largest (Kleinrock, "Power and Deterministic Rules of
Thumb for Probabilistic Problems in Computer Communications", ICC 1979): there one per cent more load begins to cost
more than one per cent more latency. It is taken where the power first falls, so that it depends neither on where the
rates end, nor on the latency of a finite trace, which stops rising once everything queues. Schedulers are compared by
one bound for all: the highest rate whose normalized latency is at most SUSTAINED times the lowest of the workload.
Both are found run by run (seed and repeat), and told with their range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from uvm_kv.report.repeats import REPEATS, medians, one_of_each

SUSTAINED = 3.0
LATENCY, TTFT, TPOT = "normalized_latency_s.mean", "ttft_s.p50", "tpot_s.p99"
METRICS = (LATENCY, TTFT, TPOT)
KEY = ["workload", "batching", "request_rate"]
RUN = ["seed", "repeat"]
"""What tells the curves of one scheduler apart: each is one draw of lengths and arrivals at all rates."""
ALIKE = ("model", "hardware", "origin", "engine", "mechanism", "offered_batch")
RANGE = ("", "_low", "_high")
"""The median, the least and the largest of the runs: endings of columns."""
CHUNKED, WHOLE = "continuous (chunked prefill)", "continuous (whole prefills)"


def usable_runs(runs: pd.DataFrame) -> pd.DataFrame:
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


def rates_table(usable: pd.DataFrame) -> pd.DataFrame:
    """A row per workload, scheduler and rate: medians over seeds and repeats, with the least and the largest."""
    table = medians(usable, KEY, keep=METRICS, study="batching").sort_values(KEY).reset_index(drop=True)
    ends = {f"{m}{end}": [repeats[at] for repeats in table[f"{m}{REPEATS}"]]
            for m in METRICS for end, at in (("_low", 0), ("_high", -1))}  # fmt: skip
    table = pd.concat([table, pd.DataFrame(ends)], axis=1)
    parts = []
    for (workload, name), part in table.groupby(["workload", "batching"], sort=True):
        bound = bound_of(table[table["workload"] == workload])
        own = usable[(usable["workload"] == workload) & (usable["batching"] == name)].sort_values("request_rate")
        curves = [(c["request_rate"].tolist(), c[LATENCY].astype(float).tolist()) for _, c in own.groupby(RUN)]
        found = {
            "knee_rate": sorted(knee(*curve) for curve in curves),
            "sustained_rate": sorted(sustained(*curve, bound) for curve in curves),
        }
        for column, rates in found.items():
            part = part.assign(**{column: _median(rates), f"{column}_low": rates[0], f"{column}_high": rates[-1]})
        knee_rate = float(part["knee_rate"].iloc[0])
        at_knee = float(np.interp(knee_rate, part["request_rate"], part[LATENCY]))
        parts.append(part.assign(knee_latency_s=at_knee if np.isfinite(knee_rate) else np.nan))
    return pd.concat(parts, ignore_index=True)


def _median(ascending: Sequence[float]) -> float:
    """The median; of two in the middle the lower one, so that it is one that was found, also among infinite ones."""
    return ascending[(len(ascending) - 1) // 2]


def _batching(run: pd.Series[Any]) -> str:
    """The scheduler with its window, and whether prefills are cut."""
    details = run["setting"] | run["variant"]
    if run["scheduler"] == "continuous":
        return CHUNKED if details.get("scheduler.chunked_prefill", True) else WHOLE
    if run["scheduler"] == "dynamic":
        return f"dynamic ({details['scheduler.window_s']:g} s)"
    return str(run["scheduler"])


def rank(name: str) -> tuple[int, float, str]:
    order = ("static", "dynamic", "continuous")
    first, _, rest = name.partition(" (")
    return order.index(first) if first in order else len(order), float(rest[:-3]) if first == "dynamic" else 0.0, name


def bound_of(part: pd.DataFrame) -> float:
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
