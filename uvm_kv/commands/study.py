"""Run everything simulated that the study rests on, from scratch, and hold it against the committed reference set.

    make study                                      all of it, about 35 minutes on 2 cores
    python -m experiments.study preemption hints    some of its experiments
    python -m experiments.study --update            and make the fresh runs the reference set
    python -m experiments.study --list

Runs go to results/study/<commit>/<experiment>/: another commit begins anew, the same one goes on where it was stopped.
With uncommitted changes everything is run again. A point is known by what tells it apart from the others, not by its
id. It agrees with the reference where every number of its summary is within TOLERANCE of the reference's and all else
is the same; a refused point agrees where the reason is the same. The simulator is deterministic, so what differs is the
arithmetic of another processor.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from math import inf, isnan
from pathlib import Path
from typing import Any

from uvm_kv.commands.figures import REFERENCE
from uvm_kv.config.grammar import parse
from uvm_kv.config.shipped import in_wheel
from uvm_kv.store.directories import check_writable
from uvm_kv.store.failures import OF_THE_ATTEMPT, failure_sha256, reason
from uvm_kv.store.family import end_children_with_me
from uvm_kv.store.provenance import git_state
from uvm_kv.store.records import Record, pack, read_failures, read_records
from uvm_kv.study import STUDIES
from uvm_kv.study.points import write_roofline
from uvm_kv.study.publish import INDEX, read_index
from uvm_kv.sweep.progress import SweepEnd

RUNS = Path("results/study")
TOLERANCE = 0.001
"""Relative, of every number."""
NOTHING = 1e-9
"""Numbers this near to each other are equal, whatever their ratio: a ns, or what a difference of floats leaves of 0."""
MAX_NAMED = 3
"""Most of the differing numbers of a point that are printed."""
COMPUTED: dict[str, Callable[[Path], None]] = {"roofline": write_roofline}
"""Experiments whose points are computed, not run: each writes its packed set into a folder."""
MAX_LINES = 5
SETTINGS = ("setting", "variant")
POINT = (
    *("origin", "runner", "engine", "hardware", "link_h2d_gb_per_s", "model", "weights", "mechanism", "memory"),
    *(
        "placement",
        "reach",
        "scheduler",
        "window_s",
        "chunked_prefill",
        "admission",
        "preemption",
        "workload",
        "arrival",
    ),
    *("request_rate", "start", "prompt_tokens", "output_tokens", "layout", "block_size", "allocation", "dtype"),
    *("weight_bits", "kv_bits", "offered_batch", "seed", "repeat"),
    *("stage", "batch_size", "sequence_length", "counting", "bits"),
)
"""Fields of a summary that say which point it is, those of computed points in the last line; and SETTINGS."""


@dataclass(frozen=True)
class Agreement:
    """Fresh runs of one experiment against the reference."""

    num_points: int
    worst: float
    """The largest relative difference of any number."""
    exact: bool
    """Whether every run's summary.json is the reference's to the byte, which is more than that no number differs."""
    differing: list[str]
    missing: list[str]
    extra: list[str]

    @property
    def holds(self) -> bool:
        return not (self.differing or self.missing or self.extra)


def experiments_of(names: Sequence[str]) -> list[str]:
    """The experiments of all studies, or of those named; ValueError for an unknown name."""
    known = list(dict.fromkeys(source for study in STUDIES.values() for source in study.sources))
    wanted: dict[str, None] = {}
    for name in names or known:
        if name in STUDIES:
            wanted |= dict.fromkeys(STUDIES[name].sources)
        elif name in known:
            wanted[name] = None
        else:
            raise ValueError(f"{name}: no such experiment; there are {', '.join(known)}")
    return list(wanted)


def run_experiment(name: str, folder: Path) -> int:
    """The sweep of conf/experiment/<name>.yaml, with its report left in `folder`/<name>; its exit status. A point that
    is refused or fails is a record there, and may be a finding."""
    given = (f"experiment={name}", f"results_dir={folder}", "rerun=changed")
    end_children_with_me()
    (folder / name).mkdir(parents=True, exist_ok=True)
    with (folder / name / "sweep.log").open("w") as log:
        return subprocess.run(
            [sys.executable, "-m", "uvm_kv.cli", "run", "-m", *given], stdout=log, stderr=subprocess.STDOUT
        ).returncode


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and values of the leaves of a summary, such as `tpot_s.p99` and `warnings[0]`."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{name}.{key}" if name else key)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _leaves(value, f"{name}[{i}]")
    else:
        yield name, node


def _off(value: Any, expected: Any) -> float:
    """The relative difference; infinite where it is none of numbers, as between 1 and None."""
    if not all(isinstance(it, int | float) and not isinstance(it, bool) for it in (value, expected)):
        return 0.0 if type(value) is type(expected) and value == expected else inf
    if value == expected or (isnan(value) and isnan(expected)) or abs(value - expected) <= NOTHING:
        return 0.0
    off = abs(value / expected - 1) if expected else inf
    return inf if isnan(off) else off


def _name(told: dict[str, Any], id_: str) -> str:
    return " ".join(str(told[key]) for key in ("model", "mechanism", "offered_batch") if key in told) + f" ({id_})"


def _identity(told: dict[str, Any]) -> dict[str, Any]:
    """What a summary, or the record of a failure, says its point is: POINT, and all in setting and variant."""
    nested = {f"{part}.{key}": it for part in SETTINGS for key, it in told.get(part, {}).items()}
    return {key: told[key] for key in POINT if key in told} | nested


Told = dict[str, dict[str, Any]]
"""Summaries or records of failures, by run id."""


def pair(fresh: Told, reference: Told) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """Ids of (fresh, reference) that are one point, of those missing in `fresh`, and of those not in `reference`.

    A point is what tells it apart from the others: the fields of its identity that all on both sides have and that
    differ within a side. A setting that was added, or that changed for all alike, leaves it the same point. ValueError
    where that does not tell two points of one side apart.
    """
    sides = [{id_: _identity(told) for id_, told in side.items()} for side in (fresh, reference)]
    every = [it for side in sides for it in side.values()]
    shared = [key for key in (every[0] if every else ()) if all(key in it for it in every)]
    telling = [key for key in shared if any(len({repr(it[key]) for it in side.values()}) > 1 for side in sides)]
    keyed: list[dict[str, str]] = []
    for side, what in zip(sides, (fresh, reference), strict=True):
        ids: dict[str, str] = {}
        for id_, it in side.items():
            key = json.dumps([it[name] for name in telling])
            if (other := ids.setdefault(key, id_)) != id_:
                raise ValueError(
                    f"{_name(what[other], other)} and {_name(what[id_], id_)} differ in nothing that both sets tell of "
                    f"their points; delete the one that is not of this experiment, or make a new reference by --update"
                )
        keyed.append(ids)
    ours, theirs = keyed
    both = [(ours[key], theirs[key]) for key in ours if key in theirs]
    missing = [theirs[key] for key in theirs if key not in ours]
    return both, missing, [ours[key] for key in ours if key not in theirs]


def _differences(mine: dict[str, Any], known: dict[str, Any]) -> dict[str, float]:
    """The relative difference of every leaf; a setting that one side alone has is none of the point's results."""
    ours, theirs = dict(_leaves(mine)), dict(_leaves(known))
    found = {}
    for leaf in dict.fromkeys((*theirs, *ours)):
        if leaf in ours and leaf in theirs:
            found[leaf] = _off(ours[leaf], theirs[leaf])
        elif not leaf.startswith(tuple(f"{part}." for part in SETTINGS)):
            found[leaf] = inf
    return found


def compare(fresh: Sequence[Record], reference: Sequence[Record], tolerance: float = TOLERANCE) -> Agreement:
    """Point by point (`pair`): ids differ where a setting was added, and the numbers need not."""
    ours, theirs = {r.id: r for r in fresh}, {r.id: r for r in reference}
    both, missing, extra = pair({r.id: r.summary for r in fresh}, {r.id: r.summary for r in reference})
    worst, exact, differing = 0.0, True, []
    for name, other in both:
        if ours[name].sha256 == theirs[other].sha256:
            continue
        exact = False
        mine, known = dict(_leaves(ours[name].summary)), dict(_leaves(theirs[other].summary))
        absent = "nothing"
        offs = _differences(ours[name].summary, theirs[other].summary)
        worst = max(worst, *offs.values())
        found = [leaf for leaf, off in sorted(offs.items(), key=lambda it: -it[1]) if off > tolerance]
        if found:
            told = [
                f"{leaf} {mine.get(leaf, absent)} instead of {known.get(leaf, absent)}" for leaf in found[:MAX_NAMED]
            ]
            told += [f"{len(found) - MAX_NAMED} more"] if len(found) > MAX_NAMED else []
            differing.append(f"{_name(ours[name].summary, name)}: {', '.join(told)}")
    return Agreement(
        len(ours),
        worst,
        exact,
        differing,
        [_name(theirs[name].summary, name) for name in missing],
        [_name(ours[name].summary, name) for name in extra],
    )


def compare_failures(fresh: Told, reference: Told) -> list[str]:
    """Points that are refused or failed on one side alone, or for another reason, a line each."""
    both, missing, extra = pair(fresh, reference)
    lines = []
    for mine, known in [*both, *((None, id_) for id_ in missing), *((id_, None) for id_ in extra)]:
        sides = [side[id_] for side, id_ in ((fresh, mine), (reference, known)) if id_ is not None]
        if len(sides) == 2:
            told = [{key: value for key, value in it.items() if key not in OF_THE_ATTEMPT} for it in sides]
            if not any(off > TOLERANCE for off in _differences(*told).values()):
                continue
        said = [
            "not so" if id_ is None else f"refused or failed, {reason(side[id_])}"
            for side, id_ in ((fresh, mine), (reference, known))
        ]
        lines.append(f"{_name(sides[0], str(mine or known))}: {said[0]}; in the reference {said[1]}")
    return lines


def update_reference(name: str, fresh: Sequence[Record], failures: dict[str, dict[str, Any]], reference: Path) -> None:
    """Make the fresh runs of an experiment the reference: its packed set, and its hashes in the index."""
    index = read_index(reference)
    pack(fresh, failures, reference / name)
    index[name] = {
        "runs": {record.id: record.sha256 for record in sorted(fresh, key=lambda r: r.id)},
        "failed": {id_: failure_sha256(record) for id_, record in sorted(failures.items())},
    }
    temporary = reference / f"{INDEX}.tmp"
    temporary.write_text(json.dumps(dict(sorted(index.items())), indent=0) + "\n")
    temporary.replace(reference / INDEX)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 where everything agrees, 1 where something differs or failed, 2 for a mistake in `arguments`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.study", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these experiments or figures")
    parser.add_argument("--results", type=Path, default=RUNS, help=f"where the runs go (default: {RUNS})")
    parser.add_argument("--reference", type=Path, default=REFERENCE)
    parser.add_argument("--update", action="store_true", help="the fresh runs become the reference set")
    parser.add_argument("--list", action="store_true", help="the experiments")
    parser.add_argument("--json", action="store_true", help="one JSON object; the lines go to stderr")
    options = parse(parser, arguments)
    if options.list:
        known = experiments_of(())
        print(json.dumps(known) if options.json else "\n".join(known))
        return 0
    try:
        names = experiments_of(options.names)
        if options.update and in_wheel() and options.reference == REFERENCE:
            raise ValueError("update=true would change the installed package; give reference=DIR")
        check_writable(options.results, "--results ")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    state = git_state()
    dirty = bool(state["git_dirty"]) or state["git_sha"] is None
    folder = options.results.resolve() / (str(state["git_sha"])[:12] + ("-dirty" if dirty else ""))
    began, agrees = time.monotonic(), dict[str, bool]()
    with redirect_stdout(sys.stderr if options.json else sys.stdout):
        for name in names:
            start = time.monotonic()
            agrees[name] = _one(name, folder, options.reference, update=options.update, afresh=dirty, start=start)
        print(f"{len(names)} experiments in {time.monotonic() - began:.0f} s on {os.cpu_count()} cores: {folder}")
    if options.json:
        print(json.dumps({"folder": str(folder), "agrees": agrees}, indent=1))
    return 0 if all(agrees.values()) else 1


def unfinished(folder: Path, failures: dict[str, dict[str, Any]], status: int) -> str | None:
    """Why the sweep whose runs are in `folder` has not all that it asked for; None where it has, or what is missing was
    refused. A sweep with refused points has an exit `status` of 1 too, as one has that broke down."""
    try:
        end = SweepEnd.read(folder)
    except ValueError as error:
        return f"its end is not known: {error}"
    if end is None:
        return f"the sweep did not come to its end (exit status {status})"
    if end.complete + end.failed < end.jobs:
        return f"only {end.complete + end.failed} of {end.jobs} jobs ended"
    failed = [record for record in failures.values() if not record.get("refused")]
    if end.unrecorded or failed:
        why = f", such as: {reason(failed[0])}" if failed else ""
        return f"{end.unrecorded + len(failed)} of {end.jobs} jobs failed, and were not refused{why}"
    return None


def _one(name: str, folder: Path, reference: Path, *, update: bool, afresh: bool, start: float) -> bool:
    computed, status = name in COMPUTED, 0
    if afresh:  # Other settings, of before the last edit, have other ids and would stay.
        shutil.rmtree(folder / name, ignore_errors=True)
    if computed:
        COMPUTED[name](folder / name)
    else:
        status = run_experiment(name, folder)
    fresh, left_out = read_records(folder / name)
    failures, failures_left_out = read_failures(folder / name)
    left_out += failures_left_out
    took = f"{time.monotonic() - start:.0f} s"
    refused = f", {len(failures)} refused or failed" if failures else ""
    print(f"{name}: {len(fresh)} runs{refused} in {took}", flush=True)
    for it in left_out:
        print(f"  left out: {it}")
    if not fresh:
        print(f"  nothing was run: {folder / name / 'sweep.log'} says why", file=sys.stderr)
        return False
    why = None if computed else unfinished(folder / name, failures, status)
    if why is not None:
        lost = "; the reference stays as it is" if update else ""
        print(f"  not whole: {why} ({folder / name / 'sweep.log'}){lost}", file=sys.stderr)
    if update and why is not None:
        return False
    if update:
        update_reference(name, fresh, failures, reference)
        print(f"  is the reference now: {reference / name}")
        return True
    if not (reference / name).is_dir():
        print("  there is no reference of it: --update makes one", file=sys.stderr)
        return False
    (known, known_left_out), (known_failures, more) = read_records(reference / name), read_failures(reference / name)
    for it in (*known_left_out, *more):
        print(f"  left out of the reference: {it}", file=sys.stderr)
    try:
        found = compare(fresh, known)
        found.differing.extend(compare_failures(failures, known_failures))
    except ValueError as error:
        print(f"  not comparable: {error}", file=sys.stderr)
        return False
    if found.holds and why is None:
        exact = "bit for bit" if found.exact else f"within {found.worst:.1e}"
        print(f"  {found.num_points} points agree with the reference {exact} (tolerance {TOLERANCE})")
        return True
    for title, lines in (("differs", found.differing), ("not run", found.missing), ("new", found.extra)):
        for line in lines[:MAX_LINES]:
            print(f"  {title}: {line}", file=sys.stderr)
        if len(lines) > MAX_LINES:
            print(f"  {title}: {len(lines) - MAX_LINES} more", file=sys.stderr)
    return False
