"""Recordings to validate against: a run directory of this project, or a file of requests that another system served."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uvm_kv.store.checks import ANALYTIC
from uvm_kv.store.directories import read_manifest, read_summary, read_table
from uvm_kv.store.whole import is_complete
from uvm_kv.telemetry.recorder import Table
from uvm_kv.telemetry.summary import INCOMPLETE
from uvm_kv.types import NS_PER_S

REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens", "e2e_s")
OPTIONAL = ("ttft_s", "num_preemptions")
MAX_S = 1e10
"""Arrivals may be seconds since 1970."""


@dataclass(frozen=True)
class Recording:
    """One served workload: what happened to each request and, where it is known, to each step."""

    name: str
    """Run id, or the file's name without its ending."""
    origin: str
    """simulated, measured or replayed; external: a file, which does not say."""
    where: str
    """The hardware that it ran on, or the file."""
    requests: Table
    steps: Table | None
    """None: steps were not observed."""
    provenance: dict[str, Any]
    steady_until_ns: int | None = None
    """End of a run that began in its steady state; None: the run began cold."""

    @property
    def label(self) -> str:
        return f"{self.origin}, {self.where}"


def load_run(directory: Path) -> Recording:
    """A finished run directory. ValueError if it is none, was cut short, or served nothing: but for one that began in
    its steady state, which has steps from the first on."""
    if not is_complete(directory, any_schema=True):
        raise ValueError(
            f"recorded={directory}: it is neither a finished run directory (they hold summary.json) nor a file"
        )
    try:
        summary, manifest = read_summary(directory), read_manifest(directory)
        requests, steps = read_table(directory, "requests"), read_table(directory, "steps")
    except (OSError, ValueError) as error:  # ValueError: not JSON, or no table.
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise ValueError(f"recorded={directory}: not readable ({reason}); record it again") from None
    if summary["origin"] == ANALYTIC:
        raise ValueError(f"recorded={directory}: a computed point, which served nothing; give a run")
    if not requests["request_id"] and summary.get("start") != "steady":
        raise ValueError(f"recorded={directory}: no request was finished; record a longer run")
    if INCOMPLETE in summary["warnings"]:
        raise ValueError(f"recorded={directory}: {INCOMPLETE}; record a whole run, without max_steps")
    on_cpu = summary["memory_emulated"]
    provenance = {
        "runner": summary["runner"],
        # On the CPU the profile only sized the tiers.
        "hardware": None if on_cpu else summary["hardware"],
        "gpu": manifest["gpu"],
        **{key: manifest[key] for key in ("git_sha", "git_dirty", "seed", "repeat", "started")},
    }
    where = "CPU" if on_cpu else str(summary["hardware"])
    window = summary["steady_window_s"] if summary.get("start") == "steady" else None
    until = None if window is None else round(window[1] * NS_PER_S)
    return Recording(directory.name, summary["origin"], where, requests, steps, provenance, until)


def load_file(path: Path) -> Recording:
    """A CSV with a header, or a JSONL file, with one request per row: arrival_s (from any zero), prompt_tokens,
    output_tokens, e2e_s, and as far as they are known ttft_s and num_preemptions; other columns are ignored.
    ValueError with file and line for anything else."""
    rows = sorted((_request(row, where) for row, where in _rows(path)), key=lambda r: r["arrival_ns"])
    if not rows:
        raise ValueError(f"recorded={path}: it has no requests")
    first = rows[0]["arrival_ns"]
    ids: list[int | None] = list(range(len(rows)))
    measured: list[bool | None] = [True] * len(rows)
    requests: Table = {"request_id": ids, "measured": measured}
    for name in ("prompt_tokens", "output_tokens", "num_preemptions"):
        requests[name] = [row[name] for row in rows]
    for name in ("arrival_ns", "first_token_ns", "finish_ns"):
        requests[name] = [None if row[name] is None else row[name] - first for row in rows]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Recording(path.stem, "external", path.name, requests, None, {"file": path.name, "sha256": digest})


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows with `file, line` for messages; CSV cells are text, JSON values as they are."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
        if path.suffix in (".jsonl", ".ndjson"):
            for number, line in enumerate(stream, 1):
                where = f"recorded={path}, line {number}"
                if line.strip():
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise ValueError(f"{where}: not JSON ({error})") from None
                    if not isinstance(row, dict):
                        raise ValueError(f"{where}: {line.strip()[:40]!r} is not an object of names and values")
                    _check_columns(row, where)
                    yield row, where
            return
        reader = csv.reader(stream)
        header = [name.strip() for name in next(reader, [])]
        _check_columns(header, f"recorded={path}, line 1")
        try:
            for cells in reader:
                where = f"recorded={path}, line {reader.line_num}"
                if any(cell.strip() for cell in cells):
                    if len(cells) != len(header):
                        raise ValueError(f"{where}: {len(cells)} cells where the header has {len(header)}")
                    yield {k: v.strip() for k, v in zip(header, cells, strict=True) if v.strip()}, where
        except csv.Error as error:
            raise ValueError(f"recorded={path}, line {reader.line_num}: not CSV ({error})") from None


def _check_columns(names: Any, where: str) -> None:
    absent = [name for name in REQUIRED if name not in names]
    if absent:
        raise ValueError(
            f"{where}: {', '.join(absent)} missing among {', '.join(names) or 'no columns'}; needed are "
            f"{', '.join(REQUIRED)}, and {' and '.join(OPTIONAL)} if known"
        )


def _request(row: dict[str, Any], where: str) -> dict[str, Any]:
    arrival = _number(row, "arrival_s", where)
    e2e, ttft = _number(row, "e2e_s", where), _number(row, "ttft_s", where) if "ttft_s" in row else None
    if e2e <= 0 or (ttft is not None and not 0 < ttft <= e2e):
        raise ValueError(
            f"{where}: ttft_s={ttft}, e2e_s={e2e}; both are seconds from arrival, 0 < ttft_s <= e2e_s; leave failed "
            f"requests out"
        )
    preemptions = _count(row, "num_preemptions", where, 0) if "num_preemptions" in row else None
    arrival_ns = round(arrival * NS_PER_S)
    return {
        "prompt_tokens": _count(row, "prompt_tokens", where, 1),
        "output_tokens": _count(row, "output_tokens", where, 1),
        "arrival_ns": arrival_ns,
        "first_token_ns": None if ttft is None else arrival_ns + round(ttft * NS_PER_S),
        "finish_ns": arrival_ns + round(e2e * NS_PER_S),
        "num_preemptions": preemptions,
    }


def _number(row: dict[str, Any], name: str, where: str) -> float:
    try:
        value = float(row[name])
    except (KeyError, TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= MAX_S:
        raise ValueError(f"{where}: {name} is {row.get(name)!r}; it must be seconds, from 0 to {MAX_S:.0e}")
    return value


def _count(row: dict[str, Any], name: str, where: str, least: int) -> int:
    try:
        value = float(row[name])
    except (KeyError, TypeError, ValueError):
        value = math.nan
    if not (value >= least and value.is_integer()):
        raise ValueError(f"{where}: {name} is {row.get(name)!r}; it must be a whole number, at least {least}")
    return int(value)
