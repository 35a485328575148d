"""Where a step's time goes, from a Chrome trace of torch's profiler with the runner's ranges in it.

Host time of a range is what is in no range within it. A kernel or copy of the device counts for the innermost range
that it was launched in; where that is the model's, one of our own kernels counts by its name, so that what a CUDA graph
launches is told apart too.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from math import inf
from typing import Any, NamedTuple

GROUPS = {
    "schedule": "schedule",
    "idle": "idle, no request",
    "attention": "attention",
    "append": "append",
    "execute": "model",
    "layer": "model",
    "prefetch": "memory ops",
    "evict": "memory ops",
    "move": "memory ops",
    "sample": "sample",
}
"""First word of a range's name -> row of the table."""
OUR_KERNEL = re.compile(r"uvm_kv::.*?\b(attention|merge|append|copy)_kernel")
BY_KERNEL = {"attention": "attention", "merge": "attention", "append": "append", "copy": "memory ops"}
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
LAUNCHES = {"cuda_runtime", "cuda_driver"}
SHORT_US = 10.0


class Row(NamedTuple):
    name: str
    host_ms: float
    """Mean per step."""
    device_ms: float | None
    """None where the trace has no device."""


class StepProfile(NamedTuple):
    num_steps: int
    rows: list[Row]
    """With the longest first, by device time where there is one."""
    step_ms: float
    """From one step's begin to the next one's."""
    device_busy_ms: float | None
    """Mean per step; what runs at the same time counts once."""


class _Range(NamedTuple):
    name: str
    begin: float
    end: float
    depth: int
    own: float


def step_profile(trace: dict[str, Any]) -> StepProfile:
    """ValueError for a trace without a whole step of ours."""
    events = [e for e in trace.get("traceEvents", ()) if e.get("ph") == "X"]
    ranges = _ranges(e for e in events if e.get("cat") == "user_annotation" and _word(e["name"]) in GROUPS)
    steps = [r for r in ranges if r.name == "execute"]
    if not steps:
        raise ValueError("the trace holds no step of runner=cpu or runner=cuda")
    # Between n steps lie n - 1 times of the engine; the last one is cut off where the trace ends.
    ranges = [r for r in ranges if steps[0].begin <= r.begin < steps[-1].end]
    between = [r for r in ranges if r.name == "schedule"]
    host = dict.fromkeys(GROUPS.values(), 0.0)
    for r in ranges:
        outside = _word(r.name) in ("schedule", "idle")
        host[GROUPS[_word(r.name)]] += r.own / (max(1, len(between)) if outside else len(steps)) / 1e3
    device, busy_ms = _device(events, ranges, len(steps))
    used = [name for name in host if host[name] or (device is not None and device.get(name))]
    rows = [Row(name, host[name], None if device is None else device.get(name, 0.0)) for name in used]
    rows.sort(key=lambda row: (-(row.device_ms or 0.0), -row.host_ms))
    return StepProfile(len(steps), rows, sum(host.values()), busy_ms)


class LayerKernels(NamedTuple):
    """Kernels that one layer launches, means over steps and layers: from its attention to the next layer's."""

    num: float
    num_ours: float
    """Append, attention and merge."""
    device_us: float
    """Time of all kernels of a layer together."""
    num_short: float
    """Number of kernels below SHORT_US, which take as long as their launch."""


def layer_kernels(trace: dict[str, Any]) -> LayerKernels | None:
    """Kernels per layer of eager steps: no layer launches the kernels of a graph. The last layer is left out,
    since the norm and the head come behind it. None for a trace without kernels of layers."""
    events = [e for e in trace.get("traceEvents", ()) if e.get("ph") == "X"]
    layers = [e for e in events if e.get("cat") == "user_annotation" and _word(e["name"]) == "layer"]
    last = max((int(e["name"].split()[1]) for e in layers), default=0)
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in layers if int(e["name"].split()[1]) < last)
    begins = [begin for begin, _ in spans]
    launched = {e["args"]["correlation"]: e["ts"] for e in events if e.get("cat") in LAUNCHES and "args" in e}
    found = []
    for e in events:
        at = launched.get(e["args"].get("correlation")) if e.get("cat") == "kernel" else None
        i = -1 if at is None else bisect_right(begins, at) - 1
        if i >= 0 and at is not None and at < spans[i][1]:
            found.append(e)
    if not found:
        return None
    ours = sum(OUR_KERNEL.search(e["name"]) is not None for e in found)
    short = sum(e["dur"] < SHORT_US for e in found)
    n = len(spans)
    return LayerKernels(len(found) / n, ours / n, sum(e["dur"] for e in found) / n, short / n)


def _word(name: str) -> str:
    return name.split(" ", 1)[0]


def _ranges(events: Iterable[dict[str, Any]]) -> list[_Range]:
    """In the order of their begin, with the part of each that none within it has."""
    order = sorted((e["ts"], -e["dur"], e["name"]) for e in events)
    names = [name for _, _, name in order]
    begins = [begin for begin, _, _ in order]
    ends = [begin - negative for begin, negative, _ in order]
    own = [-negative for _, negative, _ in order]
    depth, opened = [0] * len(order), list[int]()
    for i, begin in enumerate(begins):
        while opened and ends[opened[-1]] <= begin:
            opened.pop()
        if opened:
            own[opened[-1]] -= ends[i] - begin
        depth[i] = len(opened)
        opened.append(i)
    return [_Range(*parts) for parts in zip(names, begins, ends, depth, own, strict=True)]


def _device(
    events: list[dict[str, Any]], ranges: list[_Range], num_steps: int
) -> tuple[dict[str, float] | None, float | None]:
    """Milliseconds of a step by row of the table, and in all; None without a device."""
    on_device = [e for e in events if e.get("cat") in ON_DEVICE]
    if not on_device:
        return None, None
    launched = {e["args"]["correlation"]: e["ts"] for e in events if e.get("cat") in LAUNCHES and "args" in e}
    begins = [r.begin for r in ranges]
    sums: dict[str, float] = {}
    spans = []
    for e in on_device:
        at = launched.get(e["args"].get("correlation"))
        inside = None if at is None else _innermost(ranges, bisect_right(begins, at), at)
        if inside is None:
            continue  # Of a step before the first, or after the last.
        group = GROUPS[_word(inside.name)]
        if group == "model" and (ours := OUR_KERNEL.search(e["name"])):
            group = BY_KERNEL[ours[1]]
        sums[group] = sums.get(group, 0.0) + e["dur"] / 1e3 / num_steps
        spans.append((e["ts"], e["ts"] + e["dur"]))
    return sums, _covered(spans) / 1e3 / num_steps


def _innermost(ranges: list[_Range], stop: int, at: float) -> _Range | None:
    for i in range(stop - 1, -1, -1):
        if ranges[i].end > at:
            return ranges[i]
        if ranges[i].depth == 0:
            return None
    return None


def _covered(spans: list[tuple[float, float]]) -> float:
    total, until = 0.0, -inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def table_lines(profile: StepProfile) -> list[str]:
    """A short table, for a terminal and a file."""
    has_device = profile.device_busy_ms is not None
    lines = [f"{'range':18s}{'host ms/step':>14s}{'share':>8s}" + (f"{'device ms/step':>16s}" if has_device else "")]
    for row in profile.rows:
        device = f"{row.device_ms:16.3f}" if row.device_ms is not None else ""
        lines.append(f"{row.name:18s}{row.host_ms:14.3f}{row.host_ms / profile.step_ms:8.1%}{device}")
    busy = "" if profile.device_busy_ms is None else f"{profile.device_busy_ms:16.3f}"
    return [*lines, f"{'step':18s}{profile.step_ms:14.3f}{1:8.1%}{busy}"]


def kernel_line(found: LayerKernels) -> str:
    return (
        f"{found.num:.1f} kernels a layer ({found.num_ours:.1f} of ours), {found.num_short:.1f} of them below "
        f"{SHORT_US:g} us; {found.device_us:.0f} us in all"
    )
