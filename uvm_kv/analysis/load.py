"""Load finished runs into a table with one row a run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from uvm_kv.telemetry.store import completed_runs, read_json

GROUP = ["origin", "hardware", "model", "workload", "setting_id"]
"""What the points of one comparison share; mechanism and batch size vary within."""


def find_runs(folder: Path) -> list[Path]:
    """Finished runs below a folder, or the folder itself if it is one; ValueError if there are none."""
    runs = completed_runs(folder) if folder.is_dir() else []
    if not runs:
        raise ValueError(
            f"{folder}: no finished run there; give a folder with run directories (they hold summary.json)"
        )
    return runs


def load_runs(directories: Iterable[Path]) -> pd.DataFrame:
    """summary.json of every run, nested objects flattened to `tpot_s.p99`; `directory` and provenance beside it."""
    rows = []
    for directory in directories:
        try:
            summary, manifest = read_json(directory / "summary.json"), read_json(directory / "manifest.json")
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{directory}: its summary or manifest cannot be read ({error}); delete it and run again"
            ) from None
        rows.append(
            _flatten(summary)
            | {"directory": str(directory), "git_sha": manifest["git_sha"], "git_dirty": manifest["git_dirty"]}
        )
    return pd.DataFrame(rows)


def _flatten(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, int | float | np.number)


def points(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs averaged over their repeats and seeds: one row per group, mechanism and offered batch.

    Throughput is the steady one, or the whole run's where a run has no steady window. Runs on the CPU say nothing
    about memory kinds and are left out. `throughput_std` is the spread over repeats, NaN for a single run.
    """
    usable = runs[runs["runner"] != "cpu"].copy()
    usable["throughput"] = usable["output_tokens_per_s"].astype(float)
    usable["throughput"] = usable["throughput"].fillna(usable["output_tokens_per_s_whole_run"].astype(float))
    key = [*GROUP, "mechanism", "offered_batch"]
    numeric = [c for c in usable.columns if c not in key and usable[c].map(_is_number).all()]
    # A column that is None in every run is still a column of numbers, none of them observed.
    usable[numeric] = usable[numeric].apply(pd.to_numeric)
    grouped = usable.groupby(key, sort=True, dropna=False)
    table = grouped[numeric].mean()
    table["throughput_std"] = grouped["throughput"].std()
    table["num_runs"] = grouped.size()
    labels = ["admission", "memory", "placement", "prompt_tokens", "output_tokens"]
    for name in labels:
        table[name] = grouped[name].first()
    return table.reset_index()
