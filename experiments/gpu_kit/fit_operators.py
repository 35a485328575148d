"""Fit the `operators` of a hardware profile to a measured table and print them as YAML.

    python -m experiments.fit_operators TABLE.csv

TABLE.csv holds layer_name, tokens, latency_ns of the operators of one Llama-3.1-8B layer on an RTX 3090. Every other
token count, from the second on, is fitted; the rest is what tests/hw/test_roofline.py holds the result against.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from uvm_kv.hw.fit import every_other, fit_operators, read_operator_table
from uvm_kv.hw.model import ModelGeometry

LLAMA_3_8B = ModelGeometry("llama3_8b", 32, 4096, 32, 8, 128, 14336, 128256, 8192)
RTX3090_PEAK_FLOP_PER_S = 71e12
RTX3090_HBM_BYTES_PER_S = 936e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit operator costs to a measured table.")
    parser.add_argument("table", type=Path, help="CSV with layer_name, tokens, latency_ns")
    table = read_operator_table(parser.parse_args().table)
    fitted, _ = every_other(table)
    costs = fit_operators(
        fitted, LLAMA_3_8B, peak_flop_per_s=RTX3090_PEAK_FLOP_PER_S, hbm_bytes_per_s=RTX3090_HBM_BYTES_PER_S
    )
    for name, cost in costs.items():
        print(
            f"  {name}: {{overhead_us: {cost.overhead_us}, compute_efficiency: {cost.compute_efficiency}, "
            f"memory_efficiency: {cost.memory_efficiency}, knee: {cost.knee}}}"
        )
