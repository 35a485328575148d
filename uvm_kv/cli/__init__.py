"""uvm-kv: the command for everything around runs. Runs are started with `python -m experiments.run`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

DEFAULT_RESULTS = Path("results/runs")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="uvm-kv", description="What is around a run: this machine, finished runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what this machine has, what works because of it, and what does not")
    runs = commands.add_parser("runs", help="list, filter and show finished runs")
    runs.add_argument("id", nargs="?", help="show this run (the beginning of its id is enough) instead of a list")
    runs.add_argument(
        "--folder", type=Path, default=DEFAULT_RESULTS, help=f"where runs are (default: {DEFAULT_RESULTS})"
    )
    runs.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="only runs with that summary field; repeatable",
    )
    advise = commands.add_parser("advise", help="would CPU-backed KV help this card, model and workload? simulated")
    advise.add_argument(
        "overrides", nargs="*", metavar="key=value", help="hardware=rtx3090 model=llama_7b workload=fixed ..."
    )
    advise.add_argument("--json", action="store_true", help="one JSON object (docs/advise.md) instead of lines")
    report = commands.add_parser("report", help="verdict, tables, figure and HTML page of the runs below a folder")
    report.add_argument(
        "folder",
        type=Path,
        help="results/runs/<experiment>, or any folder of run directories; or a sweep's report, such as "
        "results/runs/adhoc/reports/latest, to make it again from its own runs",
    )
    report.add_argument("--out", type=Path, help="where to write (default: FOLDER/report, or the sweep's report)")
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command == "advise" and not any(word.startswith("-") for word in rest):
        arguments.overrides += rest  # What stands behind an option.
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        # Imported when needed: pandas and matplotlib take a second, for which --help should not wait.
        if arguments.command == "doctor":
            from uvm_kv.cli.doctor import doctor

            print("\n".join(doctor()))
        elif arguments.command == "runs":
            from uvm_kv.cli.runs import list_runs, show_run

            if arguments.id is None:
                list_runs(arguments.folder, arguments.where)
            else:
                show_run(arguments.folder, arguments.id)
        elif arguments.command == "advise":
            from uvm_kv.cli.advise import print_advice

            print_advice(arguments.overrides, as_json=arguments.json)
        else:
            _report(arguments.folder, arguments.out)
    except (ValueError, OSError) as error:
        from uvm_kv.store.checks import visible

        print(f"error: {visible(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _report(folder: Path, out: Path | None) -> None:
    from uvm_kv.report.load import find_runs
    from uvm_kv.report.terminal import plain_console, print_report
    from uvm_kv.report.write import write_report
    from uvm_kv.store.directories import REPORT_RUNS, check_writable
    from uvm_kv.store.records import read_failures, read_sweep

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
    print_report(write_report(records, out, list(failures.values()), left_out, argv), plain_console())
