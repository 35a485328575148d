"""A study's files: <name>.pdf and .png, .csv of exactly what is drawn, .json with runs, their hashes and claims.

Equal runs give equal bytes: no file holds a date, a path or a host.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from uvm_kv.analysis.load import load_runs
from uvm_kv.analysis.study.base import Drawn, Study
from uvm_kv.analysis.style import SMALL, save_figure
from uvm_kv.telemetry.failures import gaps
from uvm_kv.telemetry.records import LeftOut, Record, read_failures, read_records
from uvm_kv.telemetry.store import written_whole

INDEX = "index.json"
"""In a reference folder: {experiment: {run id: sha256 of its summary}}."""
MAX_NAMED = 8


@dataclass(frozen=True)
class Source:
    """The runs of the experiments that a study draws."""

    records: list[Record]
    failures: list[dict[str, Any]]
    left_out: list[LeftOut]


@dataclass(frozen=True)
class Published:
    study: Study
    drawn: Drawn
    records: list[Record]
    origins: list[str]
    unknown: list[str]
    """Ids of runs that are not of the reference set, or not as they are there."""
    missing: list[str]
    """Points of the reference set that have no run here."""
    left_out: list[LeftOut]
    files: list[Path]

    @property
    def num_runs(self) -> int:
        return len(self.records)


def read_source(study: Study, results: Path, *, allow_mixed: bool = False, origin: str | None = None) -> Source:
    """The study's runs below `results`/<experiment>. ValueError where there are none, or of several origins or schema
    versions that `allow_mixed` does not allow; `origin` takes those of one origin."""
    records: list[Record] = []
    failures: list[dict[str, Any]] = []
    left_out: list[LeftOut] = []
    for name in study.sources:
        if not (folder := results / name).is_dir():
            raise ValueError(
                f"{study.name}: there is no {folder}; python -m experiments.run -m experiment={name} "
                f"results_dir={results} makes it"
            )
        found, rest = read_records(folder, any_schema=allow_mixed)
        records += [r for r in found if origin is None or r.summary["origin"] == origin]
        failures += read_failures(folder)
        left_out += rest
    if not records:
        of = f" of origin {origin}" if origin else ""
        more = f" ({len(left_out)} are left out, such as {left_out[0]})" if left_out else ""
        raise ValueError(f"{study.name}: no usable run{of} below {results}{more}")
    origins = sorted({r.summary["origin"] for r in records})
    if len(origins) > 1 and not allow_mixed:
        counts = ", ".join(f"{sum(r.summary['origin'] == o for r in records)} {o}" for o in origins)
        raise ValueError(f"{study.name}: runs of several origins ({counts}); --origin takes one, --allow-mixed all")
    return Source(records, failures, left_out)


def read_index(reference: Path) -> dict[str, dict[str, str]]:
    """The hashes of a reference set; empty where there is none, so that every run is unknown."""
    path = reference / INDEX
    if not path.is_file():
        return {}
    try:
        index: dict[str, dict[str, str]] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); take it from the repository again") from None
    return index


def missing_points(study: Study, runs: pd.DataFrame, expected: pd.DataFrame) -> list[str]:
    """Points of `expected`, as `key=value` of the study's factors, that `runs` has not."""

    def points(table: pd.DataFrame) -> dict[str, None]:
        names = [f for f in study.factors if f in table]
        rows = table[names].drop_duplicates().itertuples(index=False)
        return dict.fromkeys(" ".join(f"{k}={v}" for k, v in zip(names, row, strict=True)) for row in rows)

    have = points(runs)
    return sorted(point for point in points(expected) if point not in have)


def publish(
    study: Study,
    source: Source,
    out: Path,
    index: Mapping[str, Mapping[str, str]],
    expected: pd.DataFrame | None = None,
) -> Published:
    """Draw and write. `index`: hashes of the reference set; `expected`: its runs, to say which points are missing."""
    runs = load_runs(source.records)
    drawn = study.draw(runs, source.failures)
    known = {name: sha for experiment in study.sources for name, sha in index.get(experiment, {}).items()}
    unknown = [r.id for r in source.records if known.get(r.id) != r.sha256]
    missing = [] if expected is None else missing_points(study, runs, expected)
    origins = sorted(set(runs["origin"]))
    table = drawn.table.to_csv(index=False, lineterminator="\n")
    content = {
        "name": study.name,
        "title": study.title,
        "question": study.question,
        "origins": origins,
        "experiments": list(study.sources),
        "claims": drawn.claims,
        "csv_sha256": hashlib.sha256(table.encode()).hexdigest(),
        "runs": {r.id: r.sha256 for r in sorted(source.records, key=lambda r: r.id)},
        "git_shas": sorted({str(sha) for sha in runs["git_sha"]}),
        "runs_not_in_the_reference": unknown,
        "runs_without_a_hash_of_their_own": [r.id for r in source.records if not r.verified],
        "missing_points": missing,
        "failed": gaps(source.failures),
        "left_out": len(source.left_out),
    }
    files: list[Path] = []
    with written_whole(out) as staging:
        if drawn.figure is not None:
            drawn.figure.supxlabel(_footer(origins, len(runs), unknown, missing), fontsize=SMALL, color="#666666",
                                   x=0.99, ha="right")  # fmt: skip
            files += save_figure(drawn.figure, staging / study.name)
        for suffix, text in ((".csv", table), (".json", json.dumps(content, indent=1) + "\n")):
            files.append(staging / f"{study.name}{suffix}")
            files[-1].write_text(text)
    files = [out / file.name for file in files]
    return Published(study, drawn, source.records, origins, unknown, missing, source.left_out, files)


def _footer(origins: Sequence[str], num_runs: int, unknown: Sequence[str], missing: Sequence[str]) -> str:
    """What a reader must know who has nothing but the picture."""
    text = f"{' and '.join(origins)}, {num_runs} {'points' if origins == ['analytic'] else 'runs'}"
    if unknown:
        text += f"; {len(unknown)} of them are not of the reference set"
    if missing:
        text += f"; {len(missing)} points are missing"
    return text
