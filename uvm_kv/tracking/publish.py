"""Finished runs to Weights & Biases, after the fact and each once (docs/dashboards.md).

    python -m experiments.publish                           results/runs, as offline mirrors: no network, no account
    python -m experiments.publish results/reference --mode online
    python -m experiments.publish results/runs/batch_sweep --project my-card

Every run is a wandb run under its own id; figures, report and the packed set of an experiment are one more. The same
command sends only what is new, and it resumes after an interruption. Runs that are half-written, foreign, of another
schema or changed are listed and left out; those whose manifest holds no hash of their summary are listed and sent. Exit
status: 0, 1 where something could not be sent, 2 for a mistake in the arguments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uvm_kv.config.grammar import parse
from uvm_kv.store.failures import failure_sha256
from uvm_kv.store.records import LeftOut, Record, pack, read_failures, read_records
from uvm_kv.store.scratch import scratch_folder
from uvm_kv.tracking.track import Outcome, send_runs, usable_mode
from uvm_kv.tracking.wandb_sink import (
    LAYOUT_VERSION,
    METRICS,
    OFFLINE,
    ONLINE,
    REPORT,
    Address,
    Content,
    is_sent,
    job_type,
    send,
)

RUNS = Path("results/runs")
FIGURES = Path("results/figures")
PROJECT = "uvm-kv"
MAX_LINES = 20
MAX_NAME = 64


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.publish", description=__doc__.splitlines()[0])
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help=f"of run directories or packed sets (default: {RUNS})"
    )
    parser.add_argument("--mode", choices=(OFFLINE, ONLINE), default=OFFLINE)
    parser.add_argument("--project", default=PROJECT, help=f"wandb's (default: {PROJECT}); WANDB_ENTITY names the team")
    parser.add_argument(
        "--figures", type=Path, default=FIGURES, help=f"of python -m experiments.figures (default: {FIGURES})"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the last line")
    options = parse(parser, arguments)
    total = Outcome()
    try:
        found, left_out = read_folders(options.folders or [RUNS])
        _tell("left out", [str(it) for it in left_out])
        mode, problem = usable_mode(options.mode) if found else (OFFLINE, None)
        total.problems += [] if problem is None else [problem]
        for home, records in found.items():
            _add(total, send_runs(records, options.project, mode))
            here = [it for it in left_out if it.place.startswith(f"{home}/")]
            _add(total, send_report(home, records, here, options.figures, options.project, mode))
    except ImportError as error:
        print(f"error: {error}; pip install wandb", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was sent stays; the same command goes on from there", file=sys.stderr)
        return 130
    _tell("error", total.problems)
    done = "sent" if options.mode == ONLINE and problem is None else "written as offline mirrors"
    if options.json:
        told = {"done": done, "num_sent": total.num_sent, "num_there": total.num_there, "problems": total.problems}
        print(json.dumps(told, indent=1))
        return 1 if total.problems else 0
    nothing = "" if total.num_sent or total.problems else "; nothing to do"
    print(f"{total.num_sent} {done}, {total.num_there} were there{nothing}")
    return 1 if total.problems else 0


def read_folders(folders: Sequence[Path]) -> tuple[dict[Path, list[Record]], list[LeftOut]]:
    """Usable runs by the folder of their experiment, and what is left out. ValueError where a folder is not there."""
    found: dict[Path, dict[str, Record]] = {}
    left_out: list[LeftOut] = []
    for folder in folders:
        records, rest = read_records(folder)
        left_out += [it for it in (*rest, *read_failures(folder)[1]) if it not in left_out]
        for record in records:
            found.setdefault(record.place.parent, {})[record.id] = record
    return {home: list(records.values()) for home, records in sorted(found.items())}, left_out


def where(record: Record) -> str:
    return str(record.place) if record.place.is_dir() else f"{record.place}, {record.id}"


def send_report(
    home: Path, records: Sequence[Record], left_out: Sequence[LeftOut], figures: Path, project: str, mode: str
) -> Outcome:
    """The experiment's figures, its report and the packed set of its runs, as one wandb run under the hash of them."""
    study_files = _study_files(figures, home.name, records)
    made_of = [(r.id, r.sha256) for r in records]
    failures, _ = read_failures(home)
    made_of += [(f"{name}.failed", failure_sha256(record)) for name, record in failures.items()]
    made_of += [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in study_files]
    sha256 = hashlib.sha256(json.dumps(sorted(made_of)).encode()).hexdigest()
    name = re.sub(r"[^\w.-]", "_", home.name)[:MAX_NAME]
    address = Address(f"{name}-{sha256[:12]}", home, sha256, project)
    if is_sent(address, mode):
        return Outcome(num_there=1)
    with scratch_folder() as folder:
        try:
            content = _report_content(home, records, failures, left_out, study_files, folder, sha256)
        except (ValueError, OSError) as error:
            return Outcome(problems=[f"the report of {home}: {error}"])
        except KeyError as error:
            return Outcome(problems=[f"the report of {home}: a summary.json has no {error}"])
        failure = send(address, content, mode)
    return Outcome(num_sent=1) if failure is None else Outcome(problems=[failure])


def _report_content(
    home: Path,
    records: Sequence[Record],
    failures: dict[str, dict[str, Any]],
    left_out: Sequence[LeftOut],
    study_files: list[Path],
    out: Path,
    sha256: str,
) -> Content:
    from uvm_kv.report.write import write_report

    files = list(study_files)
    pictures = {path.stem: path for path in study_files if path.suffix == ".png"}
    usable = [record for record in records if not record.summary["memory_emulated"]]
    if usable:  # Runs on the CPU say nothing about memory kinds and have no such report.
        report = write_report(usable, out / "report", list(failures.values()), left_out)
        pictures |= {"report_figure": report.figure[0], "report": report.page}
        files += [*report.figure, report.table, report.page]
    pack(records, failures, out / "set")
    files += sorted((out / "set").iterdir())

    def each(key: str) -> list[str]:
        return sorted({str(record.summary[key]) for record in records})

    summary: dict[str, Any] = {"num_runs": len(records), "num_failed": len(failures), "num_left_out": len(left_out)}
    for kind in (job_type(record.summary) for record in records):
        summary[f"num_{kind}"] = summary.get(f"num_{kind}", 0) + 1
    return Content(
        name=f"{home.name}, {len(records)} runs",
        group=home.name,
        job_type=REPORT,
        tags=[],
        config={
            "experiment": home.name,
            **{f"{key}s": each(key) for key in ("mechanism", "model", "hardware", "memory", "origin")},
            "metrics": {m.name: {"unit": m.unit, "goal": m.goal, "what": m.what} for m in METRICS},
            "set_sha256": sha256,
            "layout_version": LAYOUT_VERSION,
        },
        summary=summary,
        pictures=pictures,
        artifact=(f"results-{re.sub(r'[^A-Za-z0-9_.-]', '_', home.name)}", "results-set", files),
    )


def _study_files(figures: Path, experiment: str, records: Sequence[Record]) -> list[Path]:
    """Files of the figures that are drawn from the experiment's runs as they are here, and not from others of it."""
    known = {record.id: record.sha256 for record in records}
    found: list[Path] = []
    for index in sorted(figures.glob("*.json")):
        try:
            content = json.loads(index.read_bytes())
            of_it, drawn = experiment in content["experiments"], dict(content["runs"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # Not of a figure.
        here = [name for name in drawn if name in known]
        if of_it and here and all(drawn[name] == known[name] for name in here):
            found += sorted(path for path in figures.glob(f"{index.stem}.*") if path.is_file())
    return found


def _add(total: Outcome, more: Outcome) -> None:
    total.num_sent += more.num_sent
    total.num_there += more.num_there
    total.problems += more.problems


def _tell(title: str, lines: Sequence[str]) -> None:
    for line in lines[:MAX_LINES]:
        print(f"{title}: {line}", file=sys.stderr)
    if len(lines) > MAX_LINES:
        print(f"{title}: {len(lines) - MAX_LINES} more", file=sys.stderr)
