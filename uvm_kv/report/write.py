"""The report of a set of runs: verdicts, tables, figure, as files and as one HTML page that opens from disk."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from uvm_kv.report.figures import sweep_figure
from uvm_kv.report.load import GROUP, load_runs, points, to_csv
from uvm_kv.report.style import save_figure
from uvm_kv.report.verdict import Verdict, verdicts, with_gains
from uvm_kv.store.directories import written_whole
from uvm_kv.store.failures import gaps
from uvm_kv.store.records import LeftOut, Record, codes

COLUMNS = {
    "label": "mechanism",
    "offered_batch": "batch",
    "running_batch_mean": "running",
    "throughput": "tok/s",
    "gain": "gain",
    "gain_same_admission": "own",
    "closed_form_ceiling": "ceiling",
    "closed_form.link": "of it link",
    "ttft_s.p50": "TTFT p50",
    "tpot_s.p99": "TPOT p99",
    "stall_share": "stall",
    "h2d_bytes": "H2D",
    "d2h_bytes": "D2H",
    "gpu_fault_groups": "faults",
    "evicted_chunks": "evicted",
    "preemptions": "preempt.",
    "energy_j_per_output_token": "J/token",
}


@dataclass(frozen=True)
class Report:
    verdicts: list[Verdict]
    best: dict[str, pd.DataFrame]
    """Per group title: the best point of each mechanism, formatted."""
    memory: list[tuple[str, list[tuple[str, int]]]]
    """Per model and card: where its memory goes, in bytes."""
    warnings: list[str]
    gaps: list[str]
    """Points that are missing because their job failed, and why."""
    figure: list[Path]
    table: Path
    page: Path


def write_report(
    records: Sequence[Record],
    out: Path,
    failed: Sequence[dict[str, Any]] = (),
    left_out: Sequence[LeftOut] = (),
    argv: Sequence[str] | None = None,
) -> Report:
    """Write figure.png, figure.pdf, points.csv and report.html below `out`. `failed`: records of the points that are
    missing, with the reason. `left_out`: what was found and is not used. `argv`: the command of the sweep, which
    differs from that of a run that another sweep has made; None: that of the runs."""
    runs = load_runs(records)
    if argv is not None:
        runs["argv"] = [list(argv)] * len(runs)
    found_points = points(runs)
    if found_points.empty:
        raise ValueError("the runs are all of runner=cpu, whose throughput says nothing about memory kinds")
    table = with_gains(found_points)
    table["stall_share"] = table["stall_s"].astype(float) / table["duration_s"].astype(float)
    found = verdicts(table)
    best = {part["title"].iloc[0]: format_points(_best_points(part)) for _, part in table.groupby(GROUP, sort=True)}
    memory, missing = _memory(runs), gaps(failed)
    warnings = [f"left out: {it}" for it in left_out] + _not_together(records, runs, table)
    warnings += _warnings(runs)
    with written_whole(out) as staging:
        figure = save_figure(sweep_figure(table), staging / "figure")
        text = to_csv(table.drop(columns=["throughputs", "by_draw", "argv"]))
        (staging / "points.csv").write_text(text, encoding="utf-8")
        page = _page(runs, table, found, best, memory, warnings, missing, figure[0])
        (staging / "report.html").write_text(page, encoding="utf-8")
    figure = [out / file.name for file in figure]
    return Report(found, best, memory, warnings, missing, figure, out / "points.csv", out / "report.html")


def _best_points(part: pd.DataFrame) -> pd.DataFrame:
    rows = part.sort_values(["throughput", "offered_batch"], ascending=[False, True])
    return rows.drop_duplicates("label")


def format_points(part: pd.DataFrame) -> pd.DataFrame:
    """Points as text with units, for people; `-` where there is no value."""

    def number(spec: str, scale: float = 1.0, unit: str = "") -> Callable[[Any], str]:
        return lambda x: "-" if pd.isna(x) else format(float(x) * scale, spec) + unit

    formats = {
        "offered_batch": number(".0f"),
        "running_batch_mean": number(".1f"),
        "throughput": number(".1f"),
        "gain": number("+.1%"),
        "gain_same_admission": number("+.1%"),
        "closed_form_ceiling": number("+.1%"),
        "closed_form.link": number("+.1%"),
        "ttft_s.p50": number(".3g", 1, " s"),
        "tpot_s.p99": number(".1f", 1e3, " ms"),
        "stall_share": number(".1%"),
        "h2d_bytes": number(".1f", 1e-9, " GB"),
        "d2h_bytes": number(".1f", 1e-9, " GB"),
        "gpu_fault_groups": number(".0f"),
        "evicted_chunks": number(".0f"),
        "preemptions": number(".0f"),
        "energy_j_per_output_token": number(".2f"),
    }
    text = pd.DataFrame(index=part.index)
    for column, name in COLUMNS.items():
        values = part[column] if column in part else pd.Series(np.nan, part.index)
        text[name] = values.map(formats[column]) if column in formats else values
    return text


def _memory(runs: pd.DataFrame) -> list[tuple[str, list[tuple[str, int]]]]:
    tables: dict[str, list[tuple[str, int]]] = {}
    for _, run in runs.iterrows():
        rows = [(str(name), int(value)) for name, value in run["memory_budget"]]
        tables.setdefault(f"{run['model']} in {run['dtype']} on {run['hardware']}", rows)
    return sorted(tables.items())


def _not_together(records: Sequence[Record], runs: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    """What is kept apart, and what is not counted."""
    found = [f"{line}; they are shown apart, and rerun=changed runs the others again" for line in codes(records)]
    uncounted = int((~runs["memory_emulated"].astype(bool)).sum() - table["num_runs"].sum())
    if uncounted:
        found.append(f"{uncounted} runs have the draw of another run of their point, and count once with it")
    return found


def _warnings(runs: pd.DataFrame) -> list[str]:
    found = []
    for _, run in runs.iterrows():
        found += [f"{run['mechanism']}, batch {run['offered_batch']}: {text}" for text in run["warnings"]]
    for (model, workload), part in runs[runs["num_left_out"] > 0].groupby(["model", "workload"], sort=True):
        found.append(
            f"{model}, {workload}: {part['num_left_out'].sum() / part['num_requests'].sum():.0%} of the drawn requests "
            f"exceeded the model's context and were drawn again or left out"
        )
    if runs["git_dirty"].eq(True).any():
        found.append("some runs come from a checkout with uncommitted changes")
    return list(dict.fromkeys(found))


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1280px; margin: 2em auto; padding: 0 1em; color: #1a1a1a; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 12px; }
th, td { padding: 3px 6px; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th { background: #f4f4f4; }
td:first-child, th:first-child { text-align: left; }
.verdict { background: #eef6f1; border-left: 4px solid #009e73; padding: .7em 1em; margin: .7em 0; }
.warning { background: #fdf3e4; border-left: 4px solid #e69f00; padding: .3em 1em; margin: .3em 0; }
img { max-width: 100%; } .scroll { overflow-x: auto; } small { color: #555; }
"""


def _page(
    runs: pd.DataFrame,
    table: pd.DataFrame,
    found: list[Verdict],
    best: dict[str, pd.DataFrame],
    memory: list[tuple[str, list[tuple[str, int]]]],
    warnings: list[str],
    missing: list[str],
    picture: Path,
) -> str:
    esc = html.escape
    origins = ", ".join(sorted(set(runs["origin"])))
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>uvm-kv report</title>",
        f"<style>{_STYLE}</style>",
        "<h1>Does CPU-backed KV cache raise throughput?</h1>",
        f"<p>{len(runs)} runs: {esc(origins)}.",
        " The gain is over the best point of the better of device_resident and device_recompute; own is over the one "
        "of the same admission. The ceiling bounds the latter, for worst-case admission: what the link can carry in a "
        "step by the placement's reach, plus the device blocks that whole requests leave over and a placement with a "
        "host tier can fill. Throughput is output tokens per second over the steady window.</p>",
        *(f"<div class=verdict>{esc(v.line())}</div>" for v in found),
        *(f"<div class=warning>not measured: {esc(gap)}</div>" for gap in missing),
        *(f"<div class=warning>{esc(w)}</div>" for w in warnings[:20]),
        f"<p><small>and {len(warnings) - 20} more warnings in the summaries</small></p>" if len(warnings) > 20 else "",
        "<h2>Figure</h2>",
        f'<img alt="throughput, gain and latency by mechanism" src="data:image/png;base64,'
        f'{base64.b64encode(picture.read_bytes()).decode()}">',
    ]
    for title, rows in best.items():
        parts += [f"<h2>Best point tried of each mechanism: {esc(title)}</h2>", _html_table(rows)]
    parts.append(
        "<h2>Where it starts to lose</h2><p>The offered batch from which on a mechanism is below the better "
        "baseline at every batch tried.</p>"
    )
    for verdict in found:
        rows = pd.DataFrame(
            [(m, "not at the largest" if b is None else str(b)) for m, b in verdict.loses_from.items()],
            columns=["mechanism", "loses from batch"],
        )
        parts += [f"<p>{esc(verdict.title)}</p>", _html_table(rows)]
    parts.append("<h2>Memory of the card</h2>")
    for title, account in memory:
        rows = pd.DataFrame([(name, f"{value / 1e9:.2f} GB") for name, value in account], columns=[title, "bytes"])
        parts.append(_html_table(rows))
    parts.append("<h2>All points</h2>")
    for _, part in table.groupby(GROUP, sort=True):
        rows = format_points(part.sort_values(["label", "offered_batch"]))
        parts += [f"<p>{esc(part['title'].iloc[0])}</p>", _html_table(rows)]
    commits = ", ".join(sorted({str(sha)[:12] for sha in runs["git_sha"]}))
    parts.append(
        f"<p><small>Commit {esc(commits)}. Every number above is rebuilt from the run directories, each of "
        "which holds its config, manifest and raw step and request tables.</small></p></html>"
    )
    return "\n".join(parts)


def _html_table(rows: pd.DataFrame) -> str:
    return f"<div class=scroll>{rows.to_html(index=False, border=0)}</div>"
