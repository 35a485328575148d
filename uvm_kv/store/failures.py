"""Jobs that failed: a file beside where the run directory would be, so that a gap in a figure has a reason.

    <results_dir>/<experiment>/<run id>.failed.json

It is written over by the next failure, removed by the next success, and does not count where the run is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from uvm_kv.store.directories import temporary_path
from uvm_kv.store.whole import is_complete

SUFFIX = ".failed.json"
OF_THE_ATTEMPT = ("failed", "argv", "git_sha")
"""Fields that describe the attempt, not the point. They are not hashed."""


def _file(directory: Path) -> Path:
    return directory.with_name(directory.name + SUFFIX)


def write_failure(
    directory: Path,
    *,
    identity: dict[str, Any],
    error: str,
    tried: bool,
    argv: list[str],
    git_sha: str | None,
    refused: bool = False,
) -> None:
    """Record why the run of `directory` is not there. `identity`: the first fields of its summary. `refused`: it cannot
    be served as it is, which may be a finding. A disk that is full gets no record; the error is printed all the same.
    """
    time = datetime.now().astimezone().isoformat(timespec="seconds")
    why = {"error": error, "tried": tried, "refused": refused}
    record = {**identity, **why, "failed": time, "argv": argv, "git_sha": git_sha}
    file = _file(directory)
    temporary = temporary_path(file)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(record, indent=2) + "\n")
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def clear_failure(directory: Path) -> None:
    with contextlib.suppress(OSError):
        _file(directory).unlink(missing_ok=True)


def failure_files(folder: Path) -> dict[str, Path]:
    """Run id -> file of the record of every job below a folder that failed and has not been completed since."""
    files = sorted(f for f in folder.rglob(f"*{SUFFIX}") if not f.name.startswith("."))
    by_id = {file.name.removesuffix(SUFFIX): file for file in files}
    return {name: file for name, file in by_id.items() if not is_complete(file.with_name(name))}


def failure_sha256(record: dict[str, Any]) -> str:
    """SHA-256 of what a record says about its point. The same failure on another day has the same hash."""
    told = {key: value for key, value in record.items() if key not in OF_THE_ATTEMPT}
    return hashlib.sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def reason(record: dict[str, Any]) -> str:
    """The error in one line; for a traceback its last line, which names the error."""
    return next((line.strip() for line in reversed(record["error"].splitlines()) if line.strip()), "no reason given")


def gaps(records: Iterable[dict[str, Any]]) -> list[str]:
    """One line per mechanism and reason: which points are missing, and why."""
    points: dict[tuple[str, str, str], set[int]] = {}
    for record in records:
        key = (record["model"], record["mechanism"], reason(record))
        points.setdefault(key, set()).add(record["offered_batch"])
    return [
        f"{model}, {mechanism}, batch {', '.join(map(str, sorted(batches)))}: {why}"
        for (model, mechanism, why), batches in points.items()
    ]
