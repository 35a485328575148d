"""Predictions of a sweep, and a measured sweep held against them, point by point: docs/gpu_check.md.

    python -m experiments.validate_sweep predict --runs SIMULATED --output predictions.json
    python -m experiments.validate_sweep compare --runs MEASURED --predictions predictions.json --output DIR

The first writes what the simulator said of every point; the second reads that file, then the measurements, and writes
validation.json, .csv and .txt: step time and throughput, with a verdict at --tolerance (0.10).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from uvm_kv.config.grammar import parse
from uvm_kv.store.provenance import git_state, gpu
from uvm_kv.validate.sweep_validation import (
    TOLERANCE,
    Point,
    compare,
    lines,
    read_points,
    read_written,
    write_points,
    write_rows,
)


def _points(folder: Path) -> list[Point]:
    points, left_out = read_points(folder)
    for it in left_out:
        print(f"left out: {it}", file=sys.stderr)
    return points


def predict(options: argparse.Namespace) -> int:
    points = _points(options.runs)
    if not points:
        raise ValueError(f"--runs {options.runs}: no finished run there")
    write_points(options.output, points, {**git_state(), "hardware": options.hardware})
    if options.json:
        print(json.dumps({"points": len(points), "file": str(options.output)}))
    else:
        print(f"{options.output}: {len(points)} points predicted")
    return 0


def validate(options: argparse.Namespace) -> int:
    predicted, written = read_written(options.predictions)
    measured = _points(options.runs)
    if not measured:
        raise ValueError(f"--runs {options.runs}: no finished run there")
    digest = hashlib.sha256(options.predictions.read_bytes()).hexdigest()
    rows = compare(measured, predicted, written, options.tolerance)
    about = {"tolerance": options.tolerance, "predictions_written": written, "predictions_sha256": digest, "gpu": gpu()}
    paths = write_rows(options.output, rows, {**git_state(), **about})
    if options.json:
        print(paths[0].read_text(), end="")
        return 0
    print("\n".join(lines(rows, options.tolerance)))
    print(f"table: {'  '.join(map(str, paths))}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 2 for a mistake in `arguments` or a file that cannot be read; what was predicted wrongly is none."""
    parser = argparse.ArgumentParser(prog="python -m experiments.validate_sweep", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("predict", help="write what the simulator said")
    two = commands.add_parser("compare", help="hold measurements against it")
    for command, run in ((one, predict), (two, validate)):
        command.set_defaults(run=run)
        command.add_argument("--runs", type=Path, required=True, help="folder of finished runs")
        command.add_argument("--output", type=Path, required=True)
        command.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    one.add_argument("--hardware", help="the profile that predicted")
    two.add_argument("--predictions", type=Path, required=True)
    two.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"relative error (default {TOLERANCE})")
    options = parse(parser, arguments)
    try:
        status: int = options.run(options)
        return status
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
