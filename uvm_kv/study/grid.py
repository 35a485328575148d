"""Where CPU-backed KV pays: the gain over device-only serving in each cell of a grid of settings.

The gain of a cell is the best throughput of a placement over the batches tried beyond the card's capacity, over the
best of device_resident in that cell, less one; both under worst-case admission. What fits the card is the same in both,
and is no answer. Where the throughput still rose at the largest batch, and all of its requests ran, the gain is a lower
bound: `at_least`. Where runs start in the steady state, hence decode alone, runs of the same cells that start cold,
with their prefill, tell what is left of each gain: `cold_gain`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from uvm_kv.report.load import GROUP, points
from uvm_kv.report.statistics import judge
from uvm_kv.report.verdict import INDIFFERENT, MEASURED, is_cpu_backed, with_gains

BASELINE = "device_resident"
COLD = ["cold_gain", "cold_at_least", "cold_word"]
ALL_RUN = 0.95
"""A part of the offered requests: where the mean running batch has more, the mechanism itself holds none back."""


@dataclass(frozen=True)
class Axis:
    name: str
    """Its column in the table drawn."""
    title: str
    of: Callable[[pd.Series[Any]], tuple[float, str]]
    """From a run: where its cell lies along the axis, and what is written there."""


def cells(runs: pd.DataFrame, x: Axis, y: Axis) -> pd.DataFrame:
    """One row per cell and CPU-backed mechanism, with its gain (NaN where device_resident has no run in the cell), what
    its repeats allow to say of it (`word`, as from `judge`), and the closed form's; `x_rank` and `y_rank` count the
    cells along the axes. ValueError where the runs are of several models or cards, or one cell holds runs that differ
    in more than mechanism, batch and seed."""
    if "working_set_ratio" not in runs:
        raise ValueError("these runs do not say their working_set_ratio, as those of older versions; run them again")
    used = runs[(runs["admission"] == "worst_case") & ~runs["memory_emulated"].astype(bool)].copy()
    for name in ("model", "hardware", "origin"):
        if len(found := sorted(set(used[name]))) > 1:
            raise ValueError(f"runs of several {name}s ({', '.join(found)}) in one diagram; give those of one")
    written: dict[str, list[str]] = {}
    for rank, axis in (("x_rank", x), ("y_rank", y)):
        keys = [axis.of(run) for _, run in used.iterrows()]
        order = sorted(set(keys))
        used[rank], written[rank] = [order.index(key) for key in keys], [text for _, text in order]
    if used.empty or len(written["x_rank"]) < 2 or len(written["y_rank"]) < 2:
        raise ValueError(
            f"a diagram of {x.title} and {y.title} needs runs of two values of each, of worst_case admission"
        )
    table = with_gains(points(used))
    groups = table.groupby(["x_rank", "y_rank"])
    if (groups["group"].nunique() > 1).any():
        several = next(part for _, part in groups if part["group"].nunique() > 1)
        raise ValueError(f"one cell holds several comparisons: {'; '.join(sorted(set(several['title']))[:3])}")
    base = table[table["mechanism"] == BASELINE]
    base = base.loc[base.groupby("group")["throughput"].idxmax()].set_index("group")
    backed = table[is_cpu_backed(table) & (table["working_set_ratio"] > 1)]
    if backed.empty:
        raise ValueError(
            "no run of a CPU-backed mechanism whose full requests exceed the device KV; take larger batches"
        )
    best = backed.loc[backed.groupby([*GROUP, "label"])["throughput"].idxmax()].copy()
    best[["x_rank", "y_rank"]] = best[["x_rank", "y_rank"]].astype(int)
    least = backed.groupby([*GROUP, "label"])["offered_batch"].transform("min")
    best["least_batch"] = least[best.index]
    best["baseline_throughput"] = best["group"].map(base["throughput"])
    best["gain"] = best["gain_over_resident"]
    best["word"] = [_word(row, base["throughputs"].get(row["group"])) for _, row in best.iterrows()]
    best["at_least"] = [_still_rises(row, table) for _, row in best.iterrows()]
    best[x.name] = [written["x_rank"][rank] for rank in best["x_rank"]]
    best[y.name] = [written["y_rank"][rank] for rank in best["y_rank"]]
    for column in ("closed_form_ceiling", "closed_form.link", "closed_form.stranded", "closed_form.num_seqs"):
        best[column] = pd.to_numeric(best[column]) if column in best else np.nan
    return best.sort_values(["label", "y_rank", "x_rank"]).reset_index(drop=True)


def _word(best: pd.Series[Any], alone: Sequence[float] | None) -> str | None:
    if alone is None:
        return None
    return judge(best["throughputs"], alone, INDIFFERENT, measured=best["origin"] == MEASURED).word


def _still_rises(best: pd.Series[Any], table: pd.DataFrame) -> bool:
    """Whether a larger batch might be faster yet: none was tried, this one is above all smaller ones and the card
    alone, and what keeps requests out is not the mechanism (but their number, or the size of the CPU memory)."""
    own = table[(table["group"] == best["group"]) & (table["label"] == best["label"])]
    smaller = own[own["offered_batch"] < best["offered_batch"]]["throughput"]
    if best["offered_batch"] < own["offered_batch"].max() or best["gain"] <= INDIFFERENT:
        return False
    if len(smaller) and best["throughput"] <= (1 + INDIFFERENT) * smaller.max():
        return False
    host_bytes = best.get("host_kv_bytes", np.nan)
    is_full = best["working_set_ratio"] > 1 + host_bytes / best["device_kv_bytes"]
    return bool(is_full or best["running_batch_mean"] >= ALL_RUN * best["offered_batch"])


def with_cold(runs: pd.DataFrame, x: Axis, y: Axis) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs that the cells are made of, and the cells. Where some runs start steady, the others are not among them,
    but give the same cells (and mechanisms) the columns COLD, NaN or None where there is no such run."""
    is_steady = runs["start"] == "steady" if "start" in runs else pd.Series(False, runs.index)
    if not is_steady.any() or is_steady.all():
        return runs, cells(runs, x, y).assign(**dict.fromkeys(COLD))
    try:
        cold = cells(runs[~is_steady], x, y)
    except ValueError as error:
        raise ValueError(f"of the runs that start cold: {error}") from None
    key = ["label", y.name, x.name]
    cold = cold[[*key, "gain", "at_least", "word"]].set_axis([*key, *COLD], axis=1)
    return runs[is_steady], cells(runs[is_steady], x, y).merge(cold, how="left", on=key)
