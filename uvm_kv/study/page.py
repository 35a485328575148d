"""The report of the study: one HTML file that needs no network, light and dark, with every figure and a run table."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from uvm_kv.report.load import load_runs
from uvm_kv.store.directories import written_whole
from uvm_kv.study.kit import throughput
from uvm_kv.study.publish import Published, remarks

PAGE = "report.html"
LEADING = ("batch_sweep", "oversubscription", "phase_diagram", "long_context")
"""The studies whose headline is the answer."""
MAX_ROWS = 60
"""Rows on the page of a study that is a table; the CSV has all."""
RUN_COLUMNS = {
    "experiment": "experiment",
    "model": "model",
    "hardware": "hardware",
    "workload": "workload",
    "mechanism": "mechanism",
    "allocation": "allocation",
    "scheduler": "scheduler",
    "layout": "layout",
    "block_size": "block",
    "prompt_tokens": "prompt",
    "output_tokens": "output",
    "device_kv_bytes": "device_kv_bytes",
    "offered_batch": "batch",
    "running_batch_mean": "running",
    "throughput": "tokens_per_s",
    "tpot_s.p99": "tpot_p99_s",
    "energy_j_per_output_token": "j_per_token",
    "origin": "origin",
    "id": "run",
}
ALWAYS = ("experiment", "model", "hardware", "mechanism", "offered_batch", "throughput", "origin", "id")


def write_page(published: Sequence[Published], out: Path) -> Path:
    """`out`/report.html, of figures that are in `out` already; the path."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("uvm_kv.study", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    origins = sorted({origin for it in published for origin in it.origins})
    table = run_table(published)
    page = environment.get_template("page.html.j2").render(
        answer=answer(published),
        num_runs=len(table["rows"]),
        origins=", ".join(origins),
        figures=[_figure(it) for it in published],
        data=json.dumps(table, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    )
    with written_whole(out) as staging:
        (staging / PAGE).write_text(page, encoding="utf-8")
    return out / PAGE


def answer(published: Sequence[Published]) -> list[str]:
    """The headlines of the leading studies that are there; of the others where none is."""
    by_name = {it.study.name: it for it in published}
    leading = [by_name[name] for name in LEADING if name in by_name] or list(published)
    return [it.drawn.headline for it in leading if it.drawn.headline]


def _figure(it: Published) -> dict[str, Any]:
    picture = next((file for file in it.files if file.suffix == ".png"), None)
    warnings = [*remarks(it), *(f"missing: {point}" for point in it.missing[:5])]
    if len(it.missing) > 5:
        warnings.append(f"missing: {len(it.missing) - 5} more points")
    if it.left_out:
        warnings.append(f"{len(it.left_out)} run directories were left out, such as {it.left_out[0]}")
    shown = it.drawn.table.head(MAX_ROWS) if picture is None else None
    return {
        "name": it.study.name,
        "title": it.study.title,
        "question": it.study.question,
        "how_to_read": it.study.how_to_read,
        "claims": it.drawn.claims,
        "origins": " and ".join(it.origins),
        "num_runs": it.num_runs,
        "warnings": warnings,
        "picture": base64.b64encode(picture.read_bytes()).decode() if picture else None,
        "columns": [] if shown is None else list(shown.columns),
        "rows": [] if shown is None else [[_cell(value) for value in row] for row in shown.itertuples(index=False)],
        "files": [file.name for file in it.files],
    }


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if pd.isna(value) else f"{value:.4g}"
    return str(value)


def run_table(published: Sequence[Published]) -> dict[str, Any]:
    """{"columns", "rows"} of all runs, each once an experiment; without the columns in which all are alike."""
    parts = []
    for it in published:
        runs = load_runs(it.records)
        runs["experiment"] = [r.experiment for r in it.records]
        if "output_tokens_per_s" in runs:
            runs["throughput"] = throughput(runs)
        parts.append(runs.reindex(columns=list(RUN_COLUMNS)))
    table = pd.concat(parts, ignore_index=True).drop_duplicates(["experiment", "id"])
    told = [name for name in RUN_COLUMNS if name in ALWAYS or table[name].nunique(dropna=False) > 1]
    rows = [[_plain(value) for value in row] for row in table[told].itertuples(index=False)]
    return {"columns": [RUN_COLUMNS[name] for name in told], "rows": rows}


def _plain(value: Any) -> str | int | float | None:
    if isinstance(value, str):
        return value
    if value is None or pd.isna(value):
        return None
    number = float(value)
    return int(number) if number.is_integer() else float(f"{number:.6g}")
