"""Fit the operator costs of a profile to a measured operator table (needs scipy, in the `dev` extra).

Run by `python -m experiments.fit_operators TABLE.csv`, which prints the YAML of `conf/hardware/rtx3090.yaml`.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

from uvm_kv.hw.counting import Precision, Work, attention_work, embedding_work, head_work, operator_work
from uvm_kv.hw.model import ModelGeometry
from uvm_kv.hw.profile import OperatorCost

KNEES = (1.0, 2.0, 4.0)


def read_operator_table(path: Path) -> dict[str, dict[int, float]]:
    """Columns layer_name, tokens, latency_ns -> operator -> tokens -> seconds."""
    table: dict[str, dict[int, float]] = defaultdict(dict)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            table[row["layer_name"]][int(row["tokens"])] = float(row["latency_ns"]) * 1e-9
    return dict(table)


def all_work(model: ModelGeometry, num_tokens: int, dtype_bytes: int) -> dict[str, Work]:
    """Work of every operator of the table, the ones outside the layers included."""
    precision = Precision.of_bytes(dtype_bytes)
    return (
        operator_work(model, num_tokens, precision)
        | {"attn": attention_work(model, num_tokens, 0, precision)}
        | {"embedding": embedding_work(model, num_tokens, precision)}
        | head_work(model, num_tokens, precision)
    )


def fit_operators(
    table: dict[str, dict[int, float]],
    model: ModelGeometry,
    *,
    peak_flop_per_s: float,
    hbm_bytes_per_s: float,
    dtype_bytes: int = 2,
) -> dict[str, OperatorCost]:
    """Least squares in log time with a soft-L1 loss; the knee is the best of KNEES. Efficiencies stay at most 1."""
    from scipy.optimize import least_squares

    costs = {}
    for operator, points in table.items():
        tokens = sorted(points)
        measured = np.array([points[t] for t in tokens])
        work = np.array([all_work(model, t, dtype_bytes)[operator] for t in tokens])

        def residual(
            p: np.ndarray, knee: float, work: np.ndarray = work, measured: np.ndarray = measured
        ) -> np.ndarray:
            overhead, compute_eff, memory_eff = np.exp(p)
            compute = work[:, 0] / (peak_flop_per_s * compute_eff)
            memory = work[:, 1] / (hbm_bytes_per_s * memory_eff)
            ratio: np.ndarray = (overhead + (compute**knee + memory**knee) ** (1 / knee)) / measured
            residuals: np.ndarray = np.log(ratio)
            return residuals

        fits = [
            (
                least_squares(
                    residual,
                    [np.log(5e-6), -0.3, start],
                    bounds=([-20, -6, -6], [-7, 0, 0]),
                    loss="soft_l1",
                    f_scale=0.1,
                    args=(knee,),
                ),
                knee,
            )
            for knee in KNEES
            for start in (-0.1, -1.0, -3.0)
        ]
        best, knee = min(fits, key=lambda fit: fit[0].cost)
        overhead, compute_eff, memory_eff = np.exp(best.x)
        costs[operator] = OperatorCost(
            round(float(overhead) * 1e6, 2), round(float(compute_eff), 4), round(float(memory_eff), 4), knee
        )
    return costs


def every_other(
    table: dict[str, dict[int, float]],
) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    """Split a table by its token counts: (second, fourth, ...; first, third, ...)."""

    def take(start: int) -> dict[str, dict[int, float]]:
        return {op: {t: points[t] for t in sorted(points)[start::2]} for op, points in table.items()}

    return take(1), take(0)
