"""uvm-kv runs: a table of finished runs, or one of them in full."""

from __future__ import annotations

import argparse
import difflib
import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from uvm_kv.config.grammar import parse
from uvm_kv.report.load import find_runs, without_computed
from uvm_kv.report.terminal import plain_console, print_outputs, print_summary
from uvm_kv.store.checks import visible
from uvm_kv.store.directories import read_outputs
from uvm_kv.store.failures import reason
from uvm_kv.store.records import Record, read_failures, read_records

DEFAULT_RESULTS = Path("results/runs")
COLUMNS = ("id", "mechanism", "batch", "tok/s", "TPOT p99", "model", "workload", "experiment", "origin", "started")
NUM_WHOLE = 5
"""The first columns are never cut on a narrow terminal."""
WIDTH_WHEN_PIPED = 200


def main() -> int:
    """ValueError for a run, a folder or a field that does not exist."""
    parser = argparse.ArgumentParser(prog="uvm-kv runs", description=__doc__)
    parser.add_argument("id", nargs="?", help="show this run (the beginning of its id is enough) instead of a list")
    parser.add_argument(
        "--folder", type=Path, default=DEFAULT_RESULTS, help=f"where runs are (default: {DEFAULT_RESULTS})"
    )
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="only runs with that summary field; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="id, place and summary of each run instead of a table")
    options = parse(parser)
    if options.id is None:
        list_runs(options.folder, options.where, as_json=options.json)
    else:
        show_run(options.folder, options.id, as_json=options.json)
    return 0


def list_runs(folder: Path, conditions: list[str], *, as_json: bool = False) -> None:
    """Print the runs below a folder that meet every FIELD=VALUE, then the jobs that failed."""
    wanted = [_condition(text) for text in conditions]
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, name in enumerate(COLUMNS):
        table.add_column(name, no_wrap=True, min_width=None if i >= NUM_WHOLE else len(name))
    if not folder.is_dir():
        read_records(folder)  # It says what to give.
    failed, failures_left_out = read_failures(folder)
    records, left_out = without_computed(*read_records(folder)) if failed else find_runs(folder)
    left_out += failures_left_out
    shown = [r for r in records if all(_matches(r.summary, field, value) for field, value in wanted)]
    # A condition on a result does not hold where there is none.
    failed = {
        name: failure
        for name, failure in failed.items()
        if all(field in failure and _matches(failure, field, value) for field, value in wanted)
    }
    if as_json:
        left = [str(it) for it in left_out]
        print(json.dumps({"runs": [_as_json(r) for r in shown], "failed": failed, "left_out": left}, indent=1))
        return
    for record in shown:
        table.add_row(*_row(record))
    console = plain_console()
    if not console.is_terminal:
        console.width = WIDTH_WHEN_PIPED
    console.print(table)
    console.print(f"{len(shown)} runs in {folder}", markup=False, highlight=False)
    for it in left_out:
        console.print(f"left out: {it}", markup=False, highlight=False, soft_wrap=True)
    for name, failure in failed.items():
        line = f"failed: {name} {failure['mechanism']}, batch {failure['offered_batch']}: {reason(failure)}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def show_run(folder: Path, run_id: str, *, as_json: bool = False) -> None:
    """Print one run, by its id or a former one; ValueError if the id's beginning fits none or several."""
    records, _ = without_computed(*read_records(folder))
    failed = {name: record for name, record in read_failures(folder)[0].items() if name.startswith(run_id)}
    found = [r for r in records if r.id.startswith(run_id) or str(r.manifest.get("formerly", "")).startswith(run_id)]
    if len(failed) == 1 and not found:
        if as_json:
            print(json.dumps({"failed": failed}, indent=1))
            return
        for name, record in failed.items():
            print(f"{name}: {'failed' if record['tried'] else 'not tried'} on {record['failed']}: {record['error']}")
            print(f"argv: {' '.join(record['argv'])}")
        return
    if not found and not failed:
        raise ValueError(f"{run_id}: no such run in {folder}; uvm-kv runs lists them, and a folder goes with --folder")
    if len(found) != 1:
        fitting = [*(record.id for record in found), *failed]
        names = ", ".join(fitting[:5])
        raise ValueError(f"{run_id} fits {len(fitting)} runs in {folder} ({names}); give more of the id")
    (run,) = found
    if as_json:
        print(json.dumps({**_as_json(run), "manifest": run.manifest}, indent=1))
        return
    console = plain_console()
    print_summary(run.summary, console)
    print_outputs(read_outputs(run.place), console)
    manifest = run.manifest
    for key in ("argv", "started", "duration_s", "git_sha", "git_dirty", "gpu"):
        value = " ".join(manifest[key]) if key == "argv" else manifest[key]
        console.print(f"{key}: {value}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"run: {run.place}", markup=False, highlight=False, soft_wrap=True)


def _as_json(record: Record) -> dict[str, Any]:
    return {"id": record.id, "place": str(record.place), "summary": record.summary}


def _condition(text: str) -> tuple[str, str]:
    field, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--where {text}: write FIELD=VALUE, such as mechanism=pinned_swap")
    return field, value


def _matches(summary: dict[str, Any], field: str, value: str) -> bool:
    node: Any = summary
    for part in field.split("."):
        if not isinstance(node, dict) or part not in node:
            near = difflib.get_close_matches(field, list(summary), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"--where {field}={value}: summaries have no field {field}{hint}")
        node = node[part]
    return value == (node if isinstance(node, str) else json.dumps(node))


def _row(record: Record) -> list[str]:
    summary = record.summary
    throughput = summary["output_tokens_per_s"] or summary["output_tokens_per_s_whole_run"]
    tpot = summary["tpot_s"]["p99"]
    return [
        record.id,
        summary["mechanism"],
        str(summary["offered_batch"]),
        "-" if throughput is None else f"{throughput:.1f}",
        "-" if tpot is None else f"{tpot * 1e3:.1f} ms",
        summary["model"],
        summary["workload"],
        visible(record.experiment),
        summary["origin"],
        str(record.manifest["started"]),
    ]
