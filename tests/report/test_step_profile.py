"""The table of a step's time, from traces small enough to work out by hand; times are microseconds."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.gpu_kit.step_profile import kernel_line, layer_kernels, step_profile, table_lines


def event(cat: str, name: str, ts: float, dur: float, correlation: int | None = None) -> dict[str, Any]:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def mark(name: str, ts: float, dur: float) -> dict[str, Any]:
    return event("user_annotation", name, ts, dur)


TWO_STEPS = [
    mark("execute", 0, 10_000),
    mark("move", 500, 500),
    mark("layer 0", 2000, 4000),
    mark("prefetch", 2000, 500),
    mark("append", 2500, 500),
    mark("attention", 3000, 1000),
    mark("layer 1", 6000, 3000),
    mark("attention", 6000, 1000),
    mark("sample", 9000, 1000),
    mark("schedule", 10_000, 3000),
    mark("idle", 11_000, 1000),
    mark("execute", 13_000, 10_000),
    mark("somebody's own", 13_000, 2000),
    mark("schedule", 23_000, 90_000),
    event("cpu_op", "aten::mm", 14_000, 100),
]


def test_host_time_of_a_range_is_what_no_range_within_it_has() -> None:
    profile = step_profile({"traceEvents": TWO_STEPS})
    host = {row.name: row.host_ms for row in profile.rows}
    assert profile.num_steps == 2
    # Of the first step 0.5 + 0.5 memory ops, 2 attention, 0.5 append, 1 sample; the rest, and the second, the model.
    expected = {"model": (5.5 + 10) / 2, "attention": 1.0, "memory ops": 0.5, "append": 0.25, "sample": 0.5}
    assert host == pytest.approx(expected | {"schedule": 2.0, "idle, no request": 1.0})
    assert profile.step_ms == pytest.approx(13.0)
    assert profile.device_busy_ms is None
    assert all(row.device_ms is None for row in profile.rows)


def test_device_time_counts_where_it_was_launched_and_our_kernels_by_name() -> None:
    """A graph's kernels are all launched in the model's range; a flash kernel is attention by its range alone."""
    ours = "void uvm_kv::attention_kernel<__half, 128, 4, true>(AttentionParams)"
    launches = [(1, 7000 - 500), (2, 8000), (3, 2600), (4, 1500), (5, 2100)]
    on_device = [
        event("kernel", "flash_fwd_kernel", 10_000, 2000, 1),
        event("kernel", ours, 12_000, 1000, 2),
        event("kernel", "uvm_kv::(anonymous namespace)::append_kernel(uvm_kv::AppendParams)", 13_000, 400, 3),
        event("kernel", "gemm_kernel", 13_200, 1200, 4),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 10_500, 1000, 5),
        event("kernel", "launched before the trace began", 0, 9000, 6),
    ]
    runtime = [event("cuda_runtime", "cudaLaunchKernel", ts, 5, number) for number, ts in launches]
    profile = step_profile({"traceEvents": [*TWO_STEPS, *runtime, *on_device]})
    device = {row.name: row.device_ms for row in profile.rows if row.device_ms}
    assert device == pytest.approx({"attention": 1.5, "append": 0.2, "model": 0.6, "memory ops": 0.5})
    assert profile.device_busy_ms == pytest.approx((14.4 - 10.0) / 2)
    assert [row.name for row in profile.rows][:2] == ["attention", "model"]
    lines = table_lines(profile)
    assert lines[0].split() == ["range", "host", "ms/step", "share", "device", "ms/step"]
    assert lines[-1].split() == ["step", "13.000", "100.0%", "2.200"]


def test_kernels_are_counted_a_layer_without_the_last() -> None:
    """Two steps of three layers: what the last one launches, the head among it, is no layer's alone."""
    events = []
    for step in (0, 10_000):
        events.append(mark("execute", step, 9000))
        for layer in range(3):
            begin = step + 1000 + 2000 * layer
            events.append(mark(f"layer {layer}", begin, 2000))
            kernels = [("uvm_kv::append_kernel(uvm_kv::AppendParams)", 3), ("gemm", 50), ("elementwise", 2)]
            for i, (name, took) in enumerate([*kernels, *([("head", 900)] if layer == 2 else [])]):
                number = step + 10 * layer + i
                events.append(event("cuda_runtime", "cudaLaunchKernel", begin + 10 * i, 5, number))
                events.append(event("kernel", name, begin + 3000 + 100 * i, took, number))
    found = layer_kernels({"traceEvents": events})
    assert found == (3.0, 1.0, 55.0, 2.0)
    assert found is not None
    assert kernel_line(found) == "3.0 kernels a layer (1.0 of ours), 2.0 of them below 10 us; 55 us in all"
    assert layer_kernels({"traceEvents": TWO_STEPS}) is None, "the CPU launches none"


def test_a_trace_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no step"):
        step_profile({"traceEvents": [mark("schedule", 0, 10)]})
