"""summary.json: the numbers of one run, computed from its step and request rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from uvm_kv.kvcache.manager import KVUsage
from uvm_kv.kvcache.ops import MemoryCounters
from uvm_kv.telemetry.energy import EnergyMeter, PowerModel, energy_j
from uvm_kv.telemetry.recorder import Table
from uvm_kv.types import NS_PER_S

SCHEMA_VERSION = 3
"""Raised when the columns or the simulated numbers change their meaning: older runs are then not taken for new."""
PERCENTILES = (50, 90, 99)
MIN_FINISHES = 8
"""Requests that must end within the steady window of an open loop."""
FULL = 0.99
"""A run is limited by KV memory if it serves less than this share of its batch size while requests wait."""
INCOMPLETE = "stopped by max_steps or max_seconds before all requests were served"


def summarize(
    steps: Table,
    requests: Table,
    *,
    power: PowerModel | None,
    complete: bool,
    num_warm_up: int = 0,
    steady_until_ns: int | None = None,
    meter: EnergyMeter | None = None,
) -> dict[str, Any]:
    """Measured quantities of a run; `complete` is False where max_steps or max_seconds stopped it.

    Throughput is taken over the steady window: from the finish of the last request that is not measured (in an open
    loop, where all are measured, of the first request) to the last admission. So the prefill with which all clients
    begin lies before it. In an open loop fewer than MIN_FINISHES requests are no steady window: it would be a gap
    between arrivals. Batch and KV means are over the same window where there is one, weighted by time. Latencies
    are those of measured requests only: TTFT from arrival to first token, TPOT the mean gap between an output's tokens,
    end to end from arrival to last token, and normalized that over the output's length (Orca's and vLLM's).

    `num_warm_up`: requests that are not measured, whether or not they finished before the run was stopped.

    A run that starts in its steady state (until `steady_until_ns`) is steady from its first step on, may be stopped at
    any time, and has neither TTFT nor end-to-end latency, since nothing is prefilled.

    Energy of a simulated run (`power`) is that of the whole run; of a measured one (`meter`) that of the steady window,
    or of the whole run where there is none, as throughput is. Per output token it is divided by the tokens of the same
    time; above idle, without what the card takes in that time when it rests.
    """
    warnings = []
    if not complete and steady_until_ns is None:
        warnings.append(INCOMPLETE)
    start, end = _ints(steps, "start_ns"), _ints(steps, "end_ns")
    duration_ns = int(end[-1]) if len(end) else 0
    tokens = _ints(steps, "num_output_tokens")
    if steady_until_ns is None:
        window = _steady_window(requests, num_warm_up)
    else:
        window = (int(start[0]), steady_until_ns) if len(start) and start[0] < steady_until_ns else None
    inside = np.zeros(len(end), bool)
    steady = None
    if window is not None:
        inside = (end > window[0]) & (end <= window[1])
        steady = float(tokens[inside].sum() * NS_PER_S / (window[1] - window[0]))
    else:
        warnings.append("no steady window: too few requests follow those that warm up; it takes more of them")
    weights = (end - start).astype(float)
    if inside.any():
        weights = weights * inside
    running = _ints(steps, "num_running")
    queues = ("num_waiting", "num_swapped")
    told = all(value is not None for name in queues for value in steps[name])
    waiting = _ints(steps, queues[0]) + _ints(steps, queues[1]) if told else None
    totals = {name: _total(steps, name) for name in MemoryCounters._fields}
    measured = [i for i, is_measured in enumerate(requests["measured"]) if is_measured]
    stall_s = None if totals["stall_ns"] is None else totals["stall_ns"] / NS_PER_S
    busy_s = float((end - start).sum()) / NS_PER_S
    energy = None
    if power is not None and stall_s is not None:
        energy = energy_j(power, duration_s=duration_ns / NS_PER_S, busy_s=busy_s, stall_s=stall_s)
    idle_power_w = None if power is None else power.idle_w
    num_tokens = int(tokens.sum())
    paid_tokens, paid_ns = num_tokens, duration_ns
    if meter is not None:
        idle_power_w = meter.idle_power_w
        begin_ns, end_ns = window or (int(start[0]) if len(start) else 0, duration_ns)
        energy, paid_ns = meter.energy_j(begin_ns, end_ns), end_ns - begin_ns
        paid_tokens = num_tokens if window is None else int(tokens[inside].sum())
    above_idle = None
    if energy is not None and idle_power_w is not None:
        above_idle = energy - idle_power_w * paid_ns / NS_PER_S
    from_arrival = measured if steady_until_ns is None else []
    e2e_s = _e2e(requests, from_arrival)
    last = len(end) - 1
    preemptions = {kind: steps[f"preemptions_{kind}"][last] if last >= 0 else 0 for kind in ("recompute", "swap")}
    return {
        "running_batch_mean": _mean(running, weights),
        "running_batch_max": int(running.max()) if len(running) else 0,
        "waiting_batch_mean": None if waiting is None else _mean(waiting, weights),
        "num_requests": len(requests["request_id"]),
        "num_measured_requests": len(measured),
        "num_steps": len(end),
        "num_output_tokens": num_tokens,
        "duration_s": duration_ns / NS_PER_S,
        "steady_window_s": None if window is None else [t / NS_PER_S for t in window],
        "output_tokens_per_s": steady,
        "output_tokens_per_s_whole_run": num_tokens * NS_PER_S / duration_ns if duration_ns else None,
        "ttft_s": _distribution(_ttft(requests, from_arrival)),
        "tpot_s": _distribution(_tpot(requests, measured)),
        "e2e_s": _distribution(e2e_s),
        "normalized_latency_s": _distribution(e2e_s / _ints(requests, "output_tokens")[from_arrival]),
        "kv_bytes_mean": {name: _mean(_ints(steps, f"kv_{name}_bytes"), weights) for name in KVUsage._fields},
        "h2d_bytes": _sum_of(totals, "h2d_"),
        "d2h_bytes": _sum_of(totals, "d2h_"),
        "link_bytes_by_cause": {k: v for k, v in totals.items() if k.startswith(("h2d_", "d2h_"))},
        "gpu_fault_groups": totals["gpu_fault_groups"],
        "evicted_chunks": totals["evicted_chunks"],
        "preemptions": sum(p or 0 for p in preemptions.values()),
        "preemptions_by_kind": preemptions,
        "stall_s": stall_s,
        "energy_j": energy,
        "energy_j_per_output_token": _per(energy, paid_tokens),
        "energy_j_per_output_token_above_idle": _per(above_idle, paid_tokens),
        "power_w": None if energy is None or not paid_ns else energy * NS_PER_S / paid_ns,
        "idle_power_w": idle_power_w,
        "warnings": warnings,
    }


def _ints(table: Table, name: str) -> NDArray[np.int64]:
    return np.array(table[name], np.int64)


def _total(table: Table, name: str) -> int | None:
    values = table[name]
    return None if any(v is None for v in values) else sum(v or 0 for v in values)


def _sum_of(totals: dict[str, int | None], prefix: str) -> int | None:
    parts = [v for k, v in totals.items() if k.startswith(prefix)]
    return None if any(v is None for v in parts) else sum(v or 0 for v in parts)


def _mean(values: NDArray[np.int64], weights: NDArray[np.float64]) -> float | None:
    total = weights.sum()
    return float((values * weights).sum() / total) if total else None


def is_limited_by_memory(batch_size: float, *, running: float, waiting: float, preemptions: float) -> bool:
    """Whether KV memory limited the batch: requests were preempted, or waited while fewer ran than the `batch_size`
    allowed. `running`, `waiting`: means over time."""
    return preemptions > 0 or (waiting > (1 - FULL) * batch_size and running < FULL * batch_size)


def _steady_window(requests: Table, num_warm_up: int) -> tuple[int, int] | None:
    """From the last finish of the `num_warm_up` requests that are not measured; None while one of them is under way."""
    finishes = [
        (t, measured) for t, measured in zip(requests["finish_ns"], requests["measured"], strict=True) if t is not None
    ]
    warm_up = [t for t, measured in finishes if not measured]
    if len(warm_up) < num_warm_up:
        return None
    begin = max(warm_up) if warm_up else min((t for t, _ in finishes), default=None)
    end = max((t for t in requests["admitted_ns"] if t is not None), default=None)
    if begin is None or end is None or end <= begin:
        return None
    if not warm_up and sum(begin < t <= end for t, _ in finishes) < MIN_FINISHES:
        return None
    return begin, end


def _ttft(requests: Table, rows: list[int]) -> NDArray[np.float64]:
    arrival, first = requests["arrival_ns"], requests["first_token_ns"]
    return np.array([(first[i] or 0) - (arrival[i] or 0) for i in rows]) / NS_PER_S


def _e2e(requests: Table, rows: list[int]) -> NDArray[np.float64]:
    arrival, finish = requests["arrival_ns"], requests["finish_ns"]
    return np.array([(finish[i] or 0) - (arrival[i] or 0) for i in rows]) / NS_PER_S


def _per(quantity: float | None, number: int) -> float | None:
    return quantity / number if quantity is not None and number else None


def _tpot(requests: Table, rows: list[int]) -> NDArray[np.float64]:
    first, finish, tokens = requests["first_token_ns"], requests["finish_ns"], requests["output_tokens"]
    gaps = [((finish[i] or 0) - (first[i] or 0)) / n for i in rows if (n := (tokens[i] or 0) - 1) > 0]
    return np.array(gaps) / NS_PER_S


def _distribution(values: NDArray[np.float64]) -> dict[str, float | None]:
    if not len(values):
        return dict.fromkeys(["mean", *(f"p{p}" for p in PERCENTILES)])
    result: dict[str, float | None] = {"mean": float(values.mean())}
    for p, x in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True):
        result[f"p{p}"] = float(x)
    return result
