"""What one preemption costs, by swap and by recompute, and where the two cross."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from uvm_kv.report.repeats import REPEATS, medians, one_of_each
from uvm_kv.report.statistics import judge
from uvm_kv.report.verdict import INDIFFERENT, MEASURED

SWAP, RECOMPUTE = "pinned_swap", "device_recompute"
KEY = ["prompt_tokens", "block_size"]
RATIO, CALL_A_PIECE = "recompute_over_swap", "recompute_over_swap_call_a_piece"
COUNTS_WITHIN = 0.05
"""A part of the larger of the two numbers of preemptions. Where they differ by more, the runs did not do the same work,
and the difference of their times is not the cost of preempting in two ways."""
_NUMBERS = ("duration_s", "stall_s", "preemptions", "h2d_bytes", "d2h_bytes")


def costs(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per prompt length and block size, both ways of preemption beside each other.

    Swap costs the time that the compute stream waited for its copies. Recompute costs what its run takes beyond the run
    with swap, and beyond those waits, where both preempted (nearly) as often: only then do the two differ in nothing
    else (`is_comparable`, COUNTS_WITHIN).
    """
    if absent := sorted({SWAP, RECOMPUTE} - set(runs["mechanism"])):
        raise ValueError(f"preemption: no run of {' or '.join(absent)}; it compares {SWAP} with {RECOMPUTE}")
    one_of_each(runs, ("model", "hardware", "origin"), "preemption")
    usable = runs.dropna(subset=["prompt_tokens", *_NUMBERS]).copy()
    usable[KEY] = usable[KEY].astype(int)
    usable[list(_NUMBERS)] = usable[list(_NUMBERS)].astype(float)
    usable = medians(usable, ["mechanism", *KEY], keep=["duration_s", "stall_s"], study="preemption")
    usable["bytes_a_call"] = [_piece_bytes(run) for _, run in usable.iterrows()]
    usable["call_us"] = [float(setting["hardware.link.copy_call_us"]) for setting in usable["setting"]]
    columns = [*KEY, *_NUMBERS, "bytes_a_call", "call_us", "num_runs", f"duration_s{REPEATS}", f"stall_s{REPEATS}"]
    swap = usable.loc[usable["mechanism"] == SWAP, [*columns, "model", "hardware", "origin", "output_tokens"]]
    recompute = usable.loc[usable["mechanism"] == RECOMPUTE, columns]
    both = swap.merge(recompute, on=KEY, suffixes=("_swap", "_recompute")).sort_values(KEY).reset_index(drop=True)
    if both.empty:
        raise ValueError(f"preemption: {SWAP} and {RECOMPUTE} have no prompt_tokens and block_size in common")
    each, again = (both[name].where(both[name] > 0) for name in ("preemptions_swap", "preemptions_recompute"))
    both["swap_ms"] = 1e3 * both["stall_s_swap"] / each
    both["recompute_ms"] = 1e3 * (both["duration_s_recompute"] - both["duration_s_swap"] + both["stall_s_swap"]) / again
    calls = (both["h2d_bytes_swap"] + both["d2h_bytes_swap"]) / both["bytes_a_call_swap"] / each
    both["swap_call_a_piece_ms"] = both["swap_ms"] + 1e-3 * calls * both["call_us_swap"]
    both[RATIO] = both["recompute_ms"] / both["swap_ms"]
    both[CALL_A_PIECE] = both["recompute_ms"] / both["swap_call_a_piece_ms"]
    both["duration_swap_s"], both["duration_recompute_s"] = both["duration_s_swap"], both["duration_s_recompute"]
    both["duration_ratio"] = both["duration_recompute_s"] / both["duration_swap_s"]
    if both[RATIO].isna().all():
        raise ValueError("preemption: no run preempted anything; give it less device KV or longer outputs")
    counts = both[["preemptions_swap", "preemptions_recompute"]]
    both["is_comparable"] = counts.max(axis=1) - counts.min(axis=1) <= COUNTS_WITHIN * counts.max(axis=1)
    if sound_points(both).empty:
        raise ValueError(
            f"preemption: at no point the two preempt as often, within {COUNTS_WITHIN:.0%}; their times say nothing"
        )
    both["cheaper"] = [_cheaper(point) for _, point in both.iterrows()]
    by_prompt = dict(list(sound_points(both).groupby("prompt_tokens")))
    for column, told in ((RATIO, "crossings"), (CALL_A_PIECE, "crossings_call_a_piece")):
        at = {prompt: crossings(*by_block_size(part, column)) for prompt, part in by_prompt.items()}
        both[told] = [" ".join(f"{x:.4g}" for x in at.get(prompt, [])) for prompt in both["prompt_tokens"]]
    return both


def sound_points(table: pd.DataFrame) -> pd.DataFrame:
    """Points whose times say what a preemption costs in either way."""
    return table[table["is_comparable"] & table[RATIO].notna()]


def by_block_size(part: pd.DataFrame, column: str) -> tuple[list[float], list[float]]:
    part = part.sort_values("block_size")
    return part["block_size"].tolist(), part[column].tolist()


def _cheaper(point: pd.Series[Any]) -> str:
    """swap, recompute or neither, AMBIGUOUS where repeats do not decide, nothing where the two are not comparable."""
    if not point["is_comparable"] or pd.isna(point[RATIO]):
        return ""
    rest = point["duration_s_swap"] - point["stall_s_swap"]
    again = [(x - rest) / point["preemptions_recompute"] for x in point[f"duration_s{REPEATS}_recompute"]]
    swaps = [x / point["preemptions_swap"] for x in point[f"stall_s{REPEATS}_swap"]]
    if min(*again, *swaps) <= 0:
        return "AMBIGUOUS"
    word = judge(again, swaps, INDIFFERENT, measured=point["origin"] == MEASURED).word
    return {"HIGHER": "swap", "LOWER": "recompute", "SAME": "neither"}.get(word, word)


def _piece_bytes(run: pd.Series[Any]) -> float:
    """K, or V, of one block in one layer."""
    setting = run["setting"]
    values = int(run["block_size"]) * setting["model.num_kv_heads"] * setting["model.head_dim"]
    return float(values * run["kv_bits"] / 8)


def crossings(x: Sequence[float], ratio: Sequence[float]) -> list[float]:
    """Where `ratio` (positive, at ascending `x`) passes through 1, between neighbours interpolated linearly in the
    logarithms of both."""
    log_x, log_y = np.log(np.asarray(x, float)), np.log(np.asarray(ratio, float))
    found = []
    for i in np.flatnonzero((log_y[1:] < 0) != (log_y[:-1] < 0)):
        (x0, x1), (y0, y1) = log_x[i : i + 2], log_y[i : i + 2]
        found.append(float(np.exp(x0 - y0 * (x1 - x0) / (y1 - y0))))
    return found


def best_covered(table: pd.DataFrame) -> int:
    """The prompt length with most block sizes; of several the middle one."""
    counts = table["prompt_tokens"].value_counts().sort_index()
    full = counts[counts == counts.max()].index
    return int(full[(len(full) - 1) // 2])
