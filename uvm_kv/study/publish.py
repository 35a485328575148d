"""A study's files: <name>.pdf and .png, .csv of exactly what is drawn, .json with runs, their hashes and claims.

Equal runs give equal bytes: no file holds a date, a path or a host.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from uvm_kv.report.load import flatten, load_runs, to_csv
from uvm_kv.report.style import SMALL, save_figure
from uvm_kv.store.checks import TEXT, check_fields, dict_of, parse_json, short
from uvm_kv.store.directories import written_whole
from uvm_kv.store.failures import failure_sha256, gaps
from uvm_kv.store.records import LeftOut, Record, codes, read_failures, read_records
from uvm_kv.study.base import Drawn, Study, with_origin
from uvm_kv.study.kit import count, phases

INDEX = "index.json"
"""In a reference folder: {experiment: {"runs": {run id: sha256 of summary}, "failed": {run id: `failure_sha256`}}}."""
CHARACTERS_PER_IN = 24
"""In a footer, whose letters are SMALL."""
Index = dict[str, dict[str, dict[str, str]]]


@dataclass(frozen=True)
class Source:
    """The runs of the experiments that a study draws."""

    records: list[Record]
    failures: dict[str, dict[str, Any]]
    """By run id."""
    left_out: list[LeftOut]
    passed_over: frozenset[str] = frozenset()
    """Ids of runs and failures whose origin is not the one asked for."""


@dataclass(frozen=True)
class Published:
    study: Study
    drawn: Drawn
    records: list[Record]
    origins: list[str]
    unknown: list[str]
    """Ids of runs that are not of the reference set, or not as they are there."""
    unknown_failures: list[str]
    """The same for points that were refused or failed."""
    missing: list[str]
    """Points of the reference set that are not here."""
    left_out: list[LeftOut]
    files: list[Path]

    @property
    def num_runs(self) -> int:
        return len(self.records)


def read_source(study: Study, results: Path, *, allow_mixed: bool = False, origin: str | None = None) -> Source:
    """The study's runs below `results`/<experiment>. ValueError where there are none, or of several origins, schema
    versions or versions of the code that `allow_mixed` does not allow; `origin` takes those of one origin."""
    records: list[Record] = []
    failures: dict[str, dict[str, Any]] = {}
    left_out: list[LeftOut] = []
    passed_over: set[str] = set()
    folders = [folder for name in study.sources if (folder := results / name).is_dir()]
    if not folders:
        name = study.sources[0]
        raise ValueError(
            f"{study.name}: there is no {results / name}; python -m experiments.run -m experiment={name} "
            f"results_dir={results} makes it"
        )
    for folder in folders:
        found, rest = read_records(folder, any_schema=allow_mixed)
        failed, failed_rest = read_failures(folder)
        if origin is not None:
            passed_over |= {r.id for r in found if r.summary["origin"] != origin}
            passed_over |= {name for name, record in failed.items() if record.get("origin", origin) != origin}
        records += [r for r in found if r.id not in passed_over]
        served = {r.id for r in found}
        failures |= {name: record for name, record in failed.items() if name not in served | passed_over}
        left_out += [*rest, *failed_rest]
    if not records:
        of = f" of origin {origin}" if origin else ""
        more = f" ({len(left_out)} are left out, such as {left_out[0]})" if left_out else ""
        raise ValueError(f"{study.name}: no usable run{of} below {results}{more}")
    origins = _origins(records, failures)
    if len(origins) > 1 and not allow_mixed:
        told = [it["origin"] for it in (*(r.summary for r in records), *failures.values()) if "origin" in it]
        counts = ", ".join(f"{told.count(o)} {o}" for o in origins)
        raise ValueError(f"{study.name}: runs of several origins ({counts}); --origin takes one, --allow-mixed all")
    if (mixed := codes(records)) and not allow_mixed:
        raise ValueError(f"{study.name}: {mixed[0]}; rerun=changed runs the others again, --allow-mixed takes all")
    return Source(records, failures, left_out, frozenset(passed_over))


def _origins(records: Sequence[Record], failures: Mapping[str, dict[str, Any]]) -> list[str]:
    """The origins of runs, and of refused points, which claims rest on too."""
    return sorted({r.summary["origin"] for r in records} | {f["origin"] for f in failures.values() if "origin" in f})


def read_index(reference: Path) -> Index:
    """The hashes of a reference set; empty where there is none, so that every run is unknown."""
    path = reference / INDEX
    if not path.is_file():
        return {}
    try:
        index = parse_json(path.read_bytes())
        if not isinstance(index, dict):
            raise ValueError(f"it is {short(index)}, not an object of experiments")
        kinds = ("runs", "failed")
        for name, hashes in index.items():
            check_fields(hashes, dict.fromkeys(kinds, dict_of(TEXT)), kinds, short(name))
        return {name: {kind: hashes[kind] for kind in kinds} for name, hashes in index.items()}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); take it from the repository again") from None


def missing_points(study: Study, source: Source, index: Index, expected: Source | None) -> list[str]:
    """What the reference set has and `source` has not: points of `expected`, its runs and refusals, as `key=value` of
    the study's factors; and by id what is in its index and not in `expected` either.

    A run of the reference set stands for itself; any other, as of a changed setting, for all points of its factors.
    """
    here = {**{r.id: r.summary for r in source.records}, **source.failures}
    there = {**{r.id: r.summary for r in expected.records}, **expected.failures} if expected is not None else {}
    points = {name: _point(study, summary) for name, summary in here.items()}
    others = {point for name, point in points.items() if name not in there}
    missing = set()
    for name in there.keys() - here.keys() - source.passed_over:
        if (point := _point(study, there[name])) not in others:
            point += f" (run {name})" if point in points.values() else ""
            refused = expected is not None and name in expected.failures
            missing.add(f"{point}, refused or failed in the reference set" if refused else point)
    known = here.keys() | there.keys() | source.passed_over
    for experiment in study.sources:
        for kind, what in (("runs", "run"), ("failed", "refused or failed point")):
            listed = index.get(experiment, {}).get(kind, {})
            missing |= {f"{what} {name} of {experiment}, which is in {INDEX}" for name in listed.keys() - known}
    return sorted(missing)


def _point(study: Study, summary: dict[str, Any]) -> str:
    flat = flatten(summary)
    return " ".join(f"{name}={flat[name]}" for name in study.factors if name in flat)


def publish(study: Study, source: Source, out: Path, index: Index, expected: Source | None = None) -> Published:
    """Draw and write. `index`: hashes of the reference set; `expected`: what it holds, unless it is `source`."""
    runs = load_runs(source.records)
    origins = _origins(source.records, source.failures)
    drawn = study.draw(runs, list(source.failures.values()))
    scope = phases(runs)
    drawn = replace(drawn, claims=[with_origin(claim, origins, scope) for claim in drawn.claims])
    failures = {name: failure_sha256(source.failures[name]) for name in sorted(source.failures)}
    known, known_failures = (
        {name: sha for experiment in study.sources for name, sha in index.get(experiment, {}).get(kind, {}).items()}
        for kind in ("runs", "failed")
    )
    published = Published(
        study=study,
        drawn=drawn,
        records=source.records,
        origins=origins,
        unknown=[r.id for r in source.records if known.get(r.id) != r.sha256],
        unknown_failures=[name for name, sha in failures.items() if known_failures.get(name) != sha],
        missing=missing_points(study, source, index, expected),
        left_out=source.left_out,
        files=[],
    )
    table = to_csv(drawn.table)
    content = {
        "name": study.name,
        "title": study.title,
        "question": study.question,
        "origins": origins,
        "experiments": list(study.sources),
        "claims": drawn.claims,
        "csv_sha256": hashlib.sha256(table.encode()).hexdigest(),
        "runs": {r.id: r.sha256 for r in sorted(source.records, key=lambda r: r.id)},
        "failures": failures,
        "git_shas": sorted({str(sha) for sha in runs["git_sha"]}),
        "runs_not_in_the_reference": published.unknown,
        "failures_not_in_the_reference": published.unknown_failures,
        "missing_points": published.missing,
        "failed": gaps(source.failures.values()),
        "left_out": len(source.left_out),
    }
    files: list[Path] = []
    with written_whole(out) as staging:
        if drawn.figure is not None:
            width = int(drawn.figure.get_figwidth() * CHARACTERS_PER_IN)
            text = textwrap.fill(_footer(published), width, break_long_words=False)
            drawn.figure.supxlabel(text, fontsize=SMALL, color="#666666", x=0.99, ha="right")
            files += save_figure(drawn.figure, staging / study.name)
        for suffix, text in ((".csv", table), (".json", json.dumps(content, indent=1) + "\n")):
            files.append(staging / f"{study.name}{suffix}")
            files[-1].write_text(text, encoding="utf-8")
    return replace(published, files=[out / file.name for file in files])


def _footer(it: Published) -> str:
    """What a reader must know who has nothing but the picture."""
    text = f"{' and '.join(it.origins)}, {count(it.num_runs, 'point' if it.origins == ['analytic'] else 'run')}"
    return "; ".join([text, *remarks(it)])


def remarks(it: Published) -> list[str]:
    """How the runs differ from the reference set, for the figure's footer and the page; empty where they do not."""
    found = []
    if it.unknown:
        found.append(f"{len(it.unknown)} of {count(it.num_runs, 'run')} not of the reference set (hash unknown)")
    if it.unknown_failures:
        found.append(f"{count(len(it.unknown_failures), 'refused or failed point')} not of the reference set")
    if it.missing:
        found.append(f"{count(len(it.missing), 'point')} missing")
    return found
