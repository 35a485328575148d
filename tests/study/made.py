"""Made-up runs, as `load_runs` returns them."""

from __future__ import annotations

from typing import Any

import pandas as pd

MEMORY = {"device_resident": "device", "device_recompute": "device"}
PLACEMENT = {
    "pinned_zero_copy": "static_split",
    "pinned_prefetch_ahead": "prefetch_ahead",
    "pinned_balanced": "bandwidth_balanced",
    "managed_demand": "demand",
}


def run(mechanism: str, batch: int, throughput: float, **more: Any) -> dict[str, Any]:
    """A simulated run of Llama-2-7B on an RTX 3090; `more` takes its place or is added, `setting` is added to."""
    row: dict[str, Any] = {
        "runner": "sim",
        "origin": "simulated",
        "engine": "uvm_kv",
        "memory_emulated": False,
        "hardware": "rtx3090",
        "model": "llama2_7b",
        "workload": "fixed",
        "start": "steady",
        "mechanism": mechanism,
        "memory": MEMORY.get(mechanism, mechanism.partition("_")[0]),
        "placement": PLACEMENT.get(mechanism, "resident"),
        "admission": "optimistic" if mechanism == "device_recompute" else "worst_case",
        "offered_batch": batch,
        "working_set_ratio": batch / 8,
        "running_batch_mean": float(batch),
        "output_tokens_per_s": throughput,
        "output_tokens_per_s_whole_run": throughput,
        "waiting_batch_mean": 0.0,
        "preemptions": 0,
        "drawn": False,
        "seed": 0,
        "repeat": 0,
        "argv": None,
        "num_steps": 16,
        "num_output_tokens": 1000,
        "prompt_tokens": 448,
        "output_tokens": 64,
        "device_kv_bytes": 2**31,
        "layout": "layer_major",
        "h2d_bytes": 1e6,
        "d2h_bytes": 0.0,
        "stall_s": 0.0,
        "duration_s": 10.0,
        "tpot_s.p99": 0.02,
        "gpu_fault_groups": 0,
        "evicted_chunks": 0,
        "kv_bytes_mean.used": batch * 2.0**28,
        "kv_bits": 16,
        "variant": {"placement.name": PLACEMENT.get(mechanism, "resident")},
        "id": f"{mechanism}-{batch}",
        "git_sha": "0" * 40,
    }
    setting = {"memory.device_kv_bytes": 2**31, "hardware.link.h2d_gb_per_s": 25.0, **more.pop("setting", {})}
    return row | {"setting": setting} | more


def table(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(list(rows))
