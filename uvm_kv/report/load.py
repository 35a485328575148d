"""Load finished runs into a table with one row a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from uvm_kv.report.repeats import REPEATS, one_per_draw
from uvm_kv.report.statistics import median_interval
from uvm_kv.store.checks import ANALYTIC, formula_safe
from uvm_kv.store.directories import encode_json
from uvm_kv.store.records import LeftOut, Record, read_records
from uvm_kv.types import OUR_ENGINE

PEER_MARK = " (peer)"
GROUP = ["group", "title"]
"""Number and title of a comparison: points that differ in mechanism (with its variant) and batch size only."""


def find_runs(folder: Path) -> tuple[list[Record], list[LeftOut]]:
    """Finished runs at or below a folder, and what is left out; ValueError if none remains."""
    records, left_out = without_computed(*read_records(folder))
    if not records:
        more = f" ({len(left_out)} left out, such as {left_out[0]})" if left_out else ""
        raise ValueError(f"{folder}: no finished run there{more}; give a folder with run directories")
    return records, left_out


def without_computed(records: Iterable[Record], left_out: Iterable[LeftOut]) -> tuple[list[Record], list[LeftOut]]:
    """Runs alone: analytic points have no mechanism and no batch, and no place in a table of runs."""
    records = list(records)
    runs = [record for record in records if record.summary["origin"] != ANALYTIC]
    where = sorted({str(record.place) for record in records if record.summary["origin"] == ANALYTIC})
    return runs, [*left_out, *(LeftOut(place, "computed points, which are no runs") for place in where)]


def to_csv(table: pd.DataFrame) -> str:
    """A table as CSV, whose cells a spreadsheet never takes for formulas."""
    texts = table.select_dtypes(exclude="number")
    safe = table.assign(**{str(name): texts[name].map(formula_safe) for name in texts})
    return safe.to_csv(index=False, lineterminator="\n")


def load_runs(records: Iterable[Record]) -> pd.DataFrame:
    """summary.json of every run, nested objects flattened to `tpot_s.p99`; `id` and provenance beside it. The code that
    made a run is part of its `setting`: runs of two versions are never of one comparison."""
    return pd.DataFrame(
        [
            flatten(r.summary)
            | (
                {"setting": setting_of(r.summary) | ({"code": r.code} if r.code else {})}
                if "setting" in r.summary
                else {}
            )
            | {"id": r.id, "place": str(r.place), "git_sha": r.manifest.get("git_sha")}
            | {"git_dirty": r.manifest.get("git_dirty"), "argv": r.manifest.get("argv"), "draw": _draw(r)}
            for r in records
        ]
    )


def setting_of(summary: dict[str, Any]) -> dict[str, Any]:
    """What a run shares with those that it may be compared with. A KV budget that is what the card leaves follows from
    the batch size, as the logits of more than 256 sequences take room of it: it tells no two runs apart."""
    is_left = any(name == "KV budget" for name, _ in summary.get("memory_budget", ()))
    setting: dict[str, Any] = summary["setting"]
    return setting | ({"memory.device_kv_bytes": None} if is_left else {})


def _draw(record: Record) -> str:
    """Equal for runs of one draw. A simulated run is its draw: where nothing is random, or older versions gave several
    runs the same numbers, the results are equal to the last digit. Others are known by seed and repeat."""
    summary, manifest = record.summary, record.manifest
    if summary["origin"] == "simulated":
        numbers = {key: value for key, value in summary.items() if key not in ("seed", "repeat")}
        return hashlib.sha256(encode_json(numbers)).hexdigest()
    seed, repeat = manifest.get("seed"), manifest.get("repeat")
    # Older versions drew from the sum of the two, which their manifests have as the seed.
    return f"{seed}, {repeat if seed == summary.get('seed') else 0}"


def flatten(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as `tpot_s.p99`; `setting` and `variant` stay whole."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict) and key not in ("setting", "variant"):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, int | float | np.number)


def points(runs: pd.DataFrame, keep: Sequence[str] = ()) -> pd.DataFrame:
    """Medians over repeats and seeds: one row per comparison, mechanism and offered batch.

    Runs are of one comparison if they share everything but mechanism, batch size and seed; where several comparisons
    would bear the same title, what they differ in is added to it. A mechanism that occurs in several variants (of
    placement options, layout, hints, ...) is as many mechanisms, `label`led with what they differ in; a peer's label
    says that it is one. Nothing else is put together, and runs of one draw count once (`one_per_draw`). Throughput is
    the steady one, or the whole run's where a run has no steady window. Runs on the CPU say nothing about memory kinds
    and are left out. `throughput_low` and `throughput_high` bound it (`median_interval`) and `throughput_std` is the
    spread over repeats; NaN for one run. `throughputs` are the repeats themselves, `<column>.repeats` those of each
    column in `keep`; `by_draw` pairs each with the seed and repeat that it was drawn with.
    """
    usable = runs[~runs["memory_emulated"].astype(bool)].copy()
    if usable.empty:
        return usable
    usable["throughput"] = usable["output_tokens_per_s"].astype(float)
    usable["throughput"] = usable["throughput"].fillna(usable["output_tokens_per_s_whole_run"].astype(float))
    titles, order = _distinguish(usable, [_title(run) for _, run in usable.iterrows()], "setting")
    usable["title"], usable["group"] = titles, order
    usable["engine"] = usable["engine"].fillna(OUR_ENGINE) if "engine" in usable else OUR_ENGINE
    marks = usable["engine"].map(lambda engine: "" if engine == OUR_ENGINE else PEER_MARK)
    usable["label"], _ = _distinguish(usable, list(usable["mechanism"].astype(str) + marks), "variant")
    key = [*GROUP, "label", "offered_batch"]
    usable = one_per_draw(usable, key)
    numeric = [c for c in usable.columns if c not in key and usable[c].map(_is_number).all()]
    # A column that is None in every run is still a column of numbers, none of them observed.
    usable[numeric] = usable[numeric].apply(pd.to_numeric)
    grouped = usable.groupby(key, sort=True)
    table = grouped[numeric].median()
    intervals = grouped["throughput"].apply(lambda repeats: median_interval(list(repeats)))
    table["throughput_low"] = [interval.low for interval in intervals]
    table["throughput_high"] = [interval.high for interval in intervals]
    table["throughput_std"] = grouped["throughput"].std()
    table["throughputs"] = grouped["throughput"].apply(tuple)
    draws = zip(usable["seed"], usable["repeat"], strict=True)
    usable["by_draw"] = pd.Series(list(zip(draws, usable["throughput"], strict=True)), usable.index, dtype=object)
    table["by_draw"] = usable.groupby(key, sort=True)["by_draw"].apply(tuple)
    for name in keep:
        table[f"{name}{REPEATS}"] = grouped[name].apply(tuple)
    table["num_runs"] = grouped.size()
    shared = ("model", "workload", "origin", "hardware", "mechanism", "engine", "admission", "memory", "placement")
    for name in (*shared, "prompt_tokens", "drawn", "argv"):
        table[name] = grouped[name].first()
    return table.reset_index().copy()  # In one piece: many columns were put in one by one.


def _title(run: pd.Series[Any]) -> str:
    """What a comparison is, for people: `llama_7b, fixed 512+512, on a simulated rtx3090`."""
    lengths = ""
    if pd.notna(run["prompt_tokens"]):
        lengths = f" {int(run['prompt_tokens'])}+{int(run['output_tokens'])}"
    return f"{run['model']}, {run['workload']}{lengths}, on a {run['origin']} {run['hardware']}"


def _sortable(value: object) -> tuple[bool, float, str]:
    """Numbers by size, then anything else by its text."""
    if isinstance(value, int | float):
        return False, float(value), ""
    return True, 0.0, str(value)


def _distinguish(runs: pd.DataFrame, names: list[str], column: str) -> tuple[list[str], list[int]]:
    """Names with `key=value` of what differs between the runs of the same name in the dict `column`, and their rank."""
    details: list[dict[str, Any]] = list(runs[column])
    values: dict[str, dict[str, list[Any]]] = {}
    for name, detail in zip(names, details, strict=True):
        for key, value in detail.items():
            seen = values.setdefault(name, {}).setdefault(key, [])
            if value not in seen:
                seen.append(value)
    full, ranks = [], []
    for name, detail in zip(names, details, strict=True):
        differing = [key for key, seen in values[name].items() if len(seen) > 1]
        own = [(key, detail.get(key)) for key in differing]
        full.append(", ".join([name, *(f"{key}={value}" for key, value in own)]))
        ranks.append((name, *(_sortable(value) for _, value in own)))
    order = {rank: i for i, rank in enumerate(sorted(set(ranks)))}
    return full, [order[rank] for rank in ranks]
