"""uvm-kv report: verdict, tables, figure and HTML page of finished runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from uvm_kv.config.grammar import parse
from uvm_kv.report.load import find_runs
from uvm_kv.report.terminal import plain_console, print_report
from uvm_kv.report.write import Report, write_report
from uvm_kv.store.directories import REPORT_RUNS, check_writable
from uvm_kv.store.records import read_failures, read_sweep


def main() -> int:
    """ValueError or OSError for a folder that cannot be read or written."""
    parser = argparse.ArgumentParser(prog="uvm-kv report", description=__doc__)
    parser.add_argument(
        "folder",
        type=Path,
        help="results/runs/<experiment>, or any folder of run directories; or a sweep's report, such as "
        "results/runs/adhoc/reports/latest, to make it again from its own runs",
    )
    parser.add_argument("--out", type=Path, help="where to write (default: FOLDER/report, or the sweep's report)")
    parser.add_argument("--json", action="store_true", help="one JSON object (as_json) instead of lines")
    options = parse(parser)
    folder, out = options.folder, options.out
    if (folder / REPORT_RUNS).is_file():
        sweep = read_sweep(folder)
        records, failures, left_out, argv = sweep.records, sweep.failures, sweep.left_out, sweep.argv
        out = out or folder
    else:
        records, left_out = find_runs(folder)
        failures, more = read_failures(folder)
        left_out, argv = [*left_out, *more], None
        out = out or folder / "report"
    check_writable(out, "--out ")
    report = write_report(records, out, list(failures.values()), left_out, argv)
    if options.json:
        print(json.dumps(as_json(report), indent=1))
    else:
        print_report(report, plain_console())
    return 0


def as_json(report: Report) -> dict[str, Any]:
    """What is printed of a report: `verdicts` (a line each), `best` (the rows of each table, by its title), `warnings`,
    `gaps` (points that are missing, and why) and `files`, of which points.csv has all numbers."""
    return {
        "verdicts": [verdict.line() for verdict in report.verdicts],
        "best": {title: rows.to_dict("records") for title, rows in report.best.items()},
        "warnings": report.warnings,
        "gaps": report.gaps,
        "files": [str(path) for path in (*report.figure, report.table, report.page)],
    }
