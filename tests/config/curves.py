"""Curves generated from a known profile: what a machine that is exactly like it would be measured to do.

    python -m tests.config.curves a30 > curves.json

prints an example of a curves file (docs/calibration.md), labelled as generated.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from uvm_kv.calibrate.calibration import prefetch_counts
from uvm_kv.calibrate.curves import FORMAT, PLAN, SCHEMA_VERSION
from uvm_kv.calibrate.profile_file import load_profile
from uvm_kv.hw.counting import Precision
from uvm_kv.hw.fit import all_work
from uvm_kv.hw.model import ModelGeometry
from uvm_kv.hw.profile import HardwareProfile
from uvm_kv.hw.roofline import Roofline
from uvm_kv.runner.sim.uvm.block import Prefetcher, Rules
from uvm_kv.runner.sim.uvm.cost import prefetch_s
from uvm_kv.runner.sim.uvm.replay import ReplayStudy, run_study

MODEL = ModelGeometry("llama3_8b", 32, 4096, 32, 8, 128, 14336, 128256, 8192)


def seconds_of(profile: HardwareProfile, curve: str, at: dict[str, Any]) -> float:
    """How long it takes on that profile."""
    link = profile.link
    match curve:
        case "link" | "copy":
            rate = link.h2d_bytes_per_s if at["direction"] == "h2d" else link.d2h_bytes_per_s
            if at.get("other_direction") == "busy":
                rate *= link.duplex_h2d if at["direction"] == "h2d" else link.duplex_d2h
            return link.copy_call_us * 1e-6 + float(at["bytes"]) / rate
        case "zero_copy":
            return float(at["footprint_bytes"]) / link.zero_copy_bytes_per_s(at["footprint_bytes"])
        case "hbm":
            return 4e-6 + 2 * float(at["bytes"]) / profile.gpu.hbm_bytes_per_s
        case "prefetch":
            return prefetch_s(prefetch_counts(at["case"], at["num_chunks"]), 1, at["num_chunks"], profile)
        case "fault":
            study = ReplayStudy(at["capacity_bytes"], at["working_set_ratio"], tuple(at["passes"]), at["access"])
            return run_study(study, profile, Rules(Prefetcher(at["prefetcher"])))[-1].seconds
        case "operators":
            roofline = Roofline(profile, MODEL, 2, Precision())
            return roofline.operator_s(at["layer_name"], *all_work(MODEL, at["tokens"], 2)[at["layer_name"]])
    raise AssertionError(curve)


def curves_of(
    profile: HardwareProfile,
    curves: Iterable[str] = tuple(PLAN),
    *,
    noise: float = 0.0,
    num_repeats: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """A curves file of `profile`, as JSON; `noise` is the relative standard deviation of each repeat."""
    rng = np.random.default_rng(seed)

    def repeats(seconds: float) -> list[float]:
        factors = np.exp(noise * rng.standard_normal(num_repeats))
        return [float(seconds * factor) for factor in factors]

    gpu = profile.gpu
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "origin": "generated",
        "date": "2026-01-31",
        "tool": "tests.config.curves",
        "commit": None,
        "card": {
            "name": profile.name,
            "driver": None,
            "memory_bytes": gpu.memory_bytes,
            "hbm_gb_per_s": gpu.hbm_gb_per_s,
            "tensor_tflop_per_s": gpu.tensor_tflop_per_s,
            "tensor_int8_top_per_s": gpu.tensor_int8_top_per_s,
            "float32_tflop_per_s": gpu.float32_tflop_per_s,
        },
        "model": {**{k: v for k, v in dataclasses.asdict(MODEL).items() if v is not None}, "dtype": "float16"},
        "curves": {
            curve: [{**at, "seconds": repeats(seconds_of(profile, curve, at))} for at in PLAN[curve]]
            for curve in curves
        },
    }


if __name__ == "__main__":
    json.dump(curves_of(load_profile(sys.argv[1]), noise=0.01), sys.stdout, indent=1)
