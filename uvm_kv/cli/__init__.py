"""uvm-kv: the command for what is around a run. Runs themselves are started with `python -m experiments.run`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="uvm-kv", description="Look at finished runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="verdict, tables, figure and HTML page of the runs below a folder")
    report.add_argument("folder", type=Path, help="results/runs/<experiment>, or any folder of run directories")
    report.add_argument("--out", type=Path, help="where to write (default: FOLDER/report)")
    arguments = parser.parse_args(argv)
    try:
        _report(arguments.folder, arguments.out or arguments.folder / "report")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _report(folder: Path, out: Path) -> None:
    # Imported here: pandas and matplotlib take a second that --help need not wait for.
    from uvm_kv.analysis.load import find_runs
    from uvm_kv.analysis.report import write_report
    from uvm_kv.analysis.terminal import print_report

    print_report(write_report(find_runs(folder), out), Console())
