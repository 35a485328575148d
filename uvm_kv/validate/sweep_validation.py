"""A measured sweep against its prediction: points of both, paired, with the error of step time and throughput.

A point is a model, a mechanism, a batch and the lengths; its runs are its repeats. Predictions are written to a file
before the measurements are read, and a point says whether its prediction was there before it was measured.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from uvm_kv.store.checks import (
    AMOUNT,
    COUNT,
    NULL,
    SCALAR,
    TEXT,
    TIME,
    Fields,
    check_fields,
    formula_safe,
    list_of,
    parse_json,
    short,
)
from uvm_kv.store.directories import read_table
from uvm_kv.store.records import LeftOut, read_records
from uvm_kv.types import OUR_ENGINE
from uvm_kv.validate.comparison import NOT_OBSERVED, Better, interval, judge, relative_error

FORMAT = "uvm-kv sweep points"
TOLERANCE = 0.10
IDENTITY = (
    "model",
    "mechanism",
    "offered_batch",
    "prompt_tokens",
    "output_tokens",
    "arrival",
    "start",
    "device_kv_bytes",
)
METRICS: dict[str, Better] = {"step_s": "lower", "output_tokens_per_s": "higher"}
"""Compared metrics, and which side of them is better."""


@dataclass(frozen=True)
class Point:
    """One run. step_s: median of its steps without prefill; None where it has none."""

    identity: tuple[Any, ...]
    """The values of IDENTITY."""
    repeat: int
    step_s: float | None
    output_tokens_per_s: float | None
    num_steps: int | None
    stopped_by: str | None
    started: str


@dataclass(frozen=True)
class Row:
    """A measured point and a metric of it."""

    model: str
    mechanism: str
    batch: int
    metric: str
    measured: float | None
    """Mean over the repeats."""
    predicted: float | None
    error: float | None
    """predicted / measured - 1."""
    noise: float | None
    """Half width of the 95 % interval of the error; None for a single run."""
    verdict: str
    num_runs: int
    predicted_first: bool | None
    """Whether the prediction was written before the first of the runs began; None without a prediction."""


def read_points(folder: Path) -> tuple[list[Point], list[LeftOut]]:
    """Every finished run of our engine below a folder, and what is left out."""
    found = []
    records, left_out = read_records(folder)
    for record in records:
        summary = record.summary
        if summary.get("engine", OUR_ENGINE) != OUR_ENGINE or not record.place.is_dir():
            continue  # A peer has no prediction, and a packed set no steps.
        try:
            step_s = _step_s(record.place)
        except ValueError as error:
            left_out.append(LeftOut(str(record.place), str(error)))
            continue
        found.append(
            Point(
                tuple(summary[name] for name in IDENTITY),
                summary["repeat"],
                step_s,
                summary["output_tokens_per_s"] or summary["output_tokens_per_s_whole_run"],
                summary["num_steps"],
                summary["stopped_by"],
                record.manifest["started"],
            )
        )
    return found, left_out


def _step_s(directory: Path) -> float | None:
    steps = {name: np.array(column, float) for name, column in read_table(directory, "steps").items() if name in NEEDED}
    decodes = steps["num_scheduled_tokens"] == steps["num_running"]  # One token a sequence.
    took = (steps["end_ns"] - steps["start_ns"])[decodes]
    return float(np.median(took)) * 1e-9 if len(took) else None


POINT: Fields = {
    "identity": list_of(SCALAR, len(IDENTITY)),
    "repeat": COUNT,
    "step_s": AMOUNT | NULL,
    "output_tokens_per_s": AMOUNT | NULL,
    "num_steps": COUNT | NULL,
    "stopped_by": TEXT | NULL,
    "started": TIME,
}
NEEDED = ("start_ns", "end_ns", "num_scheduled_tokens", "num_running")


def write_points(path: Path, points: Sequence[Point], about: dict[str, Any]) -> None:
    """`about`: where they come from."""
    written = datetime.now().astimezone().isoformat(timespec="seconds")
    rows = [dict(zip(IDENTITY, p.identity, strict=True)) | asdict(p) for p in points]
    content = {"format": FORMAT, "written": written, **about, "points": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_written(path: Path) -> tuple[list[Point], str]:
    """The points of a file, and when it was written. ValueError for a file that is none."""
    try:
        content = parse_json(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {short(content['format'])}")
        names = list(Point.__dataclass_fields__)
        raw = [{name: check_fields(row, POINT, names, "a point")[name] for name in names} for row in content["points"]]
        check_fields(content, {"written": TIME}, ("written",), "it")
        return [Point(**row | {"identity": tuple(row["identity"])}) for row in raw], str(content["written"])
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); write predictions first") from None
    except (ValueError, KeyError, TypeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not a file of predictions ({why}); write it again") from None


def compare(
    measured: Iterable[Point], predicted: Iterable[Point], written: str, tolerance: float = TOLERANCE
) -> list[Row]:
    """Two rows per measured point. A repeat is paired with its own prediction, or with that of repeat 0."""
    by_identity: dict[tuple[Any, ...], dict[int, Point]] = {}
    for point in predicted:
        by_identity.setdefault(point.identity, {})[point.repeat] = point
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for point in measured:
        groups.setdefault(point.identity, []).append(point)
    rows = []
    for identity, runs in sorted(groups.items(), key=lambda group: group[0][: IDENTITY.index("offered_batch") + 1]):
        known = by_identity.get(identity, {})
        pairs = [(run, known.get(run.repeat) or known.get(0)) for run in sorted(runs, key=lambda run: run.repeat)]
        first = None
        if known:
            first = datetime.fromisoformat(written) <= min(datetime.fromisoformat(run.started) for run in runs)
        rows += [_row(identity, pairs, metric, first, tolerance) for metric in METRICS]
    return rows


def _row(
    identity: tuple[Any, ...],
    pairs: list[tuple[Point, Point | None]],
    metric: str,
    predicted_first: bool | None,
    tolerance: float,
) -> Row:
    facts = dict(zip(IDENTITY, identity, strict=True))
    head = (str(facts["model"]), str(facts["mechanism"]), int(facts["offered_batch"]), metric)
    values: list[tuple[Any, Any]] = [(getattr(m, metric), None if p is None else getattr(p, metric)) for m, p in pairs]
    measured = _mean([m for m, _ in values])
    predicted = _mean([p for _, p in values])
    if measured is None or predicted is None:
        return Row(*head, measured, predicted, None, None, NOT_OBSERVED, len(pairs), predicted_first)
    error, noise = interval([relative_error(m, p) for m, p in values])
    verdict = judge(error, noise, tolerance, METRICS[metric])
    error_or_none = error if math.isfinite(error) else None
    noise = None if noise is None or not math.isfinite(noise) else noise
    return Row(*head, measured, predicted, error_or_none, noise, verdict, len(pairs), predicted_first)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def lines(rows: Sequence[Row], tolerance: float = TOLERANCE) -> list[str]:
    """The table for people, and what it comes to."""
    found = [
        f"{'model':<12}{'mechanism':<24}{'batch':>5} {'metric':<9}{'measured':>11}{'predicted':>11}{'error':>8}"
        f"{'+-':>7}{'runs':>5}  verdict"
    ]
    for row in rows:
        name, scale = ("step ms", 1e3) if row.metric == "step_s" else ("tok/s", 1.0)
        cells = ["-" if x is None else f"{x * scale:.2f}" for x in (row.measured, row.predicted)]
        error = "-" if row.error is None else f"{row.error:+.1%}"
        noise = "-" if row.noise is None else f"{row.noise:.1%}"
        late = "" if row.predicted_first is not False else " (predicted afterwards)"
        found.append(
            f"{row.model:<12}{row.mechanism:<24}{row.batch:>5} {name:<9}{cells[0]:>11}{cells[1]:>11}{error:>8}"
            f"{noise:>7}{row.num_runs:>5}  {row.verdict}{late}"
        )
    return [*found, "", *summary_lines(rows, tolerance)]


def summary_lines(rows: Sequence[Row], tolerance: float = TOLERANCE) -> list[str]:
    """One line per mechanism and metric: how many of its points lie within the tolerance, and the largest error."""
    found = []
    for mechanism in dict.fromkeys(row.mechanism for row in rows):
        for metric in METRICS:
            own = [r for r in rows if (r.mechanism, r.metric) == (mechanism, metric) and r.error is not None]
            if own:
                within = sum(abs(r.error or 0.0) <= tolerance for r in own)
                worst = max(own, key=lambda r: abs(r.error or 0.0))
                found.append(
                    f"{mechanism}, {metric}: {within} of {len(own)} points within {tolerance:.0%}; largest error "
                    f"{worst.error:+.1%} ({worst.model}, batch {worst.batch})"
                )
    return found


def write_rows(folder: Path, rows: Sequence[Row], about: dict[str, Any]) -> list[Path]:
    """validation.json, .csv and .txt."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"validation.{ending}" for ending in ("json", "csv", "txt")]
    table = [asdict(row) for row in rows]
    paths[0].write_text(json.dumps({**about, "rows": table}, indent=1, allow_nan=False) + "\n")
    with paths[1].open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: formula_safe(value) for name, value in row.items()} for row in table)
    paths[2].write_text("\n".join(lines(rows, about["tolerance"])) + "\n")
    return paths
