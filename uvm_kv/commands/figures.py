"""The figures and tables of the study, from finished runs; nothing is run, and no GPU is needed.

    make figures                                            all, from the committed reference set, into results/figures
    python -m experiments.figures batch_sweep hints         some of them
    python -m experiments.figures batch_sweep --results results/runs --output DIR       from runs of your own
    python -m experiments.figures --list

A figure is <name>.pdf and .png, .csv of what it draws, .json with run ids, hashes and claims; report.html has all that
the command made. Equal runs give equal bytes. Runs that are half-written, foreign, of another schema or changed are
listed and left out. A figure of runs that are not in the reference set says so on its face.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uvm_kv.config.grammar import parse
from uvm_kv.config.shipped import shipped
from uvm_kv.store.directories import check_writable
from uvm_kv.study import STUDIES
from uvm_kv.study.page import write_page
from uvm_kv.study.publish import Published, publish, read_index, read_source, remarks

REFERENCE = shipped("results/reference")
FIGURES = Path("results/figures")
MAX_LINES = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 where a figure could not be made, 2 for a mistake in `arguments`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.figures", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these (--list shows them)")
    parser.add_argument(
        "--results",
        type=Path,
        default=REFERENCE,
        help="<experiment>/ folders of runs, or packed sets (default: the reference set that comes with the package)",
    )
    parser.add_argument("--output", type=Path, default=FIGURES, help=f"where they go (default: {FIGURES})")
    parser.add_argument("--reference", type=Path, default=REFERENCE, help="the set whose hashes count as known")
    parser.add_argument("--origin", choices=("simulated", "measured", "replayed"), help="only runs of that origin")
    parser.add_argument(
        "--allow-mixed", action="store_true", help="runs of several origins, schema versions or versions of the code"
    )
    parser.add_argument("--list", action="store_true", help="the figures and their questions")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    options = parse(parser, arguments)
    if options.list and options.json:
        print(json.dumps({study.name: study.question for study in STUDIES.values()}, indent=1))
        return 0
    if options.list:
        print("\n".join(f"{study.name:<22}{study.question}" for study in STUDIES.values()))
        return 0
    if unknown := [name for name in options.names if name not in STUDIES]:
        print(f"error: {unknown[0]}: no such figure; there are {', '.join(STUDIES)}", file=sys.stderr)
        return 2
    try:
        check_writable(options.output, "--output ")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    fine, made = True, []
    for name in options.names or STUDIES:
        try:
            where = (options.results, options.output, options.reference)
            published = make(name, *where, allow_mixed=options.allow_mixed, origin=options.origin)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            fine = False
            continue
        made.append(published)
        if not options.json:
            tell(published)
    page = str(write_page(made, options.output)) if made else None
    if options.json:
        print(json.dumps({"figures": [as_json(published) for published in made], "report": page}, indent=1))
    elif made:
        print(f"report: {page}")
    return 0 if fine else 1


def as_json(published: Published) -> dict[str, Any]:
    return {
        "name": published.study.name,
        "num_runs": published.num_runs,
        "files": [str(path) for path in published.files],
        "claims": published.drawn.claims,
        "left_out": [str(it) for it in published.left_out],
        "missing": published.missing,
        "remarks": list(remarks(published)),
    }


def make(
    name: str, results: Path, output: Path, reference: Path, *, allow_mixed: bool = False, origin: str | None = None
) -> Published:
    """One figure; ValueError or OSError where it cannot be made."""
    study = STUDIES[name]
    source = read_source(study, results, allow_mixed=allow_mixed, origin=origin)
    expected = None
    if results.resolve() != reference.resolve() and any((reference / e).is_dir() for e in study.sources):
        expected = read_source(study, reference)
    return publish(study, source, output, read_index(reference), expected)


def tell(published: Published) -> None:
    print(f"{published.study.name}: {published.num_runs} runs -> {'  '.join(map(str, published.files))}")
    for claim in published.drawn.claims:
        print(f"  {claim}")
    for title, lines in (("left out", published.left_out), ("missing", published.missing)):
        for line in lines[:MAX_LINES]:
            print(f"  {title}: {line}")
        if len(lines) > MAX_LINES:
            print(f"  {title}: {len(lines) - MAX_LINES} more")
    for remark in remarks(published):
        print(f"  {remark}")
