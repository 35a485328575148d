"""Whether a directory is a whole run: one answer for resuming, reports and listings. What is not whole is set aside.

A manifest holds the run's id and the hashes of all other files. Reading never changes anything; `set_aside` renames.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from uvm_kv.store.checks import ANALYTIC, check_manifest, check_summary, parse_json, short
from uvm_kv.telemetry.summary import SCHEMA_VERSION

TEMPORARY = ".tmp-"
"""How names of what is being written begin; they end with who writes it: -<pid>@<machine>."""
RUN_ID = re.compile(r"[0-9a-f]{12}-r\d+")
SET_ASIDE = re.compile(rf"{RUN_ID.pattern}\.damaged(-\d+)?")
"""Names of what was set aside, with a number where there are several: nothing reads them."""
NO_HASH = "damaged: its manifest.json lacks the run's id or hashes"
BESIDE = {"config": ("yaml",), "steps": ("parquet", "jsonl.gz"), "requests": ("parquet", "jsonl.gz")}
"""Files of a run directory beside summary and manifest, each with its endings."""


def is_complete(directory: Path, *, any_schema: bool = False) -> bool:
    """Whether `directory` holds a whole run, of this schema version unless `any_schema`."""
    return os.path.lexists(directory) and damage(directory, any_schema=any_schema) is None


def damage(directory: Path, *, any_schema: bool = False) -> str | None:
    """Why what lies at `directory` is no whole run; None where it is one, or where there is nothing."""
    try:
        read_run(directory, any_schema=any_schema)
    except ValueError as error:
        return str(error) if os.path.lexists(directory) else None
    return None


def read_run(directory: Path, *, any_schema: bool = False) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Summary, manifest and the hash of summary.json of a whole run directory. ValueError of one line for anything
    else: what is missing, unreadable, changed since it was written, of another run or (unless `any_schema`) of another
    schema version."""
    try:
        summary, manifest, sha256 = _read_json_files(directory)
        summary, manifest = check_run(directory.name, summary, manifest, sha256, any_schema=any_schema)
        _check_files(directory, manifest)
    except OSError as error:
        raise ValueError(f"damaged: it cannot be read ({error.strerror or error})") from None
    return summary, manifest, sha256


def _read_json_files(directory: Path) -> tuple[Any, Any, str]:
    if not directory.is_dir():
        raise ValueError("foreign: it is no directory")
    if not (directory / "summary.json").exists():
        raise ValueError("half-written: it has no summary.json")
    if not (directory / "manifest.json").exists():
        raise ValueError("foreign: it has no manifest.json beside its summary.json")
    contents = {name: (directory / name).read_bytes() for name in ("summary.json", "manifest.json")}
    read = []
    for name, content in contents.items():
        try:
            read.append(parse_json(content))
        except ValueError as error:
            raise ValueError(f"half-written or damaged: {name}: {error}") from None
    return read[0], read[1], hashlib.sha256(contents["summary.json"]).hexdigest()


def check_run(
    name: str, summary: Any, manifest: Any, sha256: str, *, any_schema: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The summary and the manifest, their fields checked. ValueError unless both belong to the run `name` and the
    summary is unchanged. `sha256`: hash of summary.json."""
    if not (isinstance(summary, dict) and isinstance(manifest, dict) and "schema_version" in summary):
        raise ValueError("foreign: its summary.json or manifest.json is not of a run")
    if summary["schema_version"] != SCHEMA_VERSION and not any_schema:
        raise ValueError(
            f"schema version {short(summary['schema_version'])}, where this version reads {SCHEMA_VERSION}; "
            f"run it again, or take it as it is with --allow-mixed"
        )
    try:
        summary = check_summary(summary)
        manifest = check_manifest(manifest, of_run=summary["origin"] != ANALYTIC)
    except ValueError as error:
        raise ValueError(f"foreign: {error}") from None
    if "summary_sha256" not in manifest:
        raise ValueError(NO_HASH)
    if manifest["summary_sha256"] != sha256:
        raise ValueError("tampered: its summary.json is not what the run wrote (manifest.json has its hash)")
    if manifest.get("id", name) != name:
        raise ValueError(f"misplaced: it is the run {manifest['id']}")
    return summary, manifest


def _check_files(directory: Path, manifest: dict[str, Any]) -> None:
    """Raise ValueError unless the other files exist and are as the run wrote them."""
    for stem, kinds in BESIDE.items():
        if not any((directory / f"{stem}.{kind}").is_file() for kind in kinds):
            raise ValueError(f"half-written: it has no {stem}.{kinds[0]}, so a part was deleted")
    if not {"id", "files_sha256"} <= manifest.keys():
        raise ValueError(NO_HASH)
    for name, known in manifest["files_sha256"].items():
        file = directory / name
        if not file.exists():
            raise ValueError(f"half-written: it has no {name}, so a part was deleted")
        if hashlib.sha256(file.read_bytes()).hexdigest() != known:
            raise ValueError(f"damaged: its {name} is not what the run wrote (manifest.json has its hash)")


def set_aside(directory: Path) -> str | None:
    """Rename what lies at `directory` and is no whole run, so that a run can take its place. A line that says what and
    why, or None where nothing was to be moved. Nothing is deleted."""
    why = damage(directory) and damage(directory)  # Twice: another process may be replacing the run.
    if why is None:
        return None
    aside, number = directory.with_name(f"{directory.name}.damaged"), 1
    while os.path.lexists(aside):
        number += 1
        aside = directory.with_name(f"{directory.name}.damaged-{number}")
    try:
        directory.rename(aside)
    except FileNotFoundError:  # Another process was faster.
        return None
    return f"{directory} was set aside as {aside.name}, and is run again: {why}"


def is_set_aside(path: Path) -> bool:
    """Whether `path` lies in what `set_aside` renamed."""
    return any(SET_ASIDE.fullmatch(part) for part in path.parts)


def completed_runs(folder: Path) -> list[Path]:
    """Whole run directories below a folder, of any schema version, in a stable order."""
    found = (path.parent for path in folder.rglob("summary.json"))
    ours = (p for p in found if not is_set_aside(p) and not any(part.startswith(TEMPORARY) for part in p.parts))
    return sorted(p for p in ours if is_complete(p, any_schema=True))
