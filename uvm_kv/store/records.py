"""Finished runs as records: read from run directories or from a packed set, checked, and what is left out listed.

A packed set is `runs.jsonl.gz`, one line per run in order of ids, with {"id", "summary", "manifest"}. Reference sets
are committed in this form (results/README.md). Nothing here writes into, mends or deletes a run directory.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from uvm_kv.store.checks import ANY_TEXT, Kind, check_failure, check_fields, list_of, parse_json, short, visible
from uvm_kv.store.directories import REPORT_RUNS, encode_json, write_gzip
from uvm_kv.store.failures import failure_files
from uvm_kv.store.whole import RUN_ID, TEMPORARY, check_run, is_set_aside, read_run

PACKED = "runs.jsonl.gz"
PACKED_FAILURES = "failed.jsonl.gz"
ID = re.compile(r"[\w.-]{1,100}", re.ASCII)
"""Id of a line of a packed set. The ids of computed points are not hashes."""


@dataclass(frozen=True)
class Record:
    """One finished run."""

    id: str
    place: Path
    """Its run directory, or the packed set that it is a line of."""
    summary: dict[str, Any]
    manifest: dict[str, Any]
    sha256: str
    """SHA-256 of summary.json."""

    @property
    def code(self) -> str | None:
        """The beginning of the hash of the code that made it. None of a packed set: `make study` holds its numbers
        against those of the present code."""
        if self.place.name == PACKED:
            return None
        return str(self.manifest.get("code_sha256", "not recorded"))[:12]

    @property
    def experiment(self) -> str:
        """The folder that the run, or its packed set, lies in."""
        return self.place.parent.name


@dataclass(frozen=True)
class LeftOut:
    """A run directory or a line of a packed set that cannot be used, and the reason."""

    place: str
    why: str

    def __str__(self) -> str:
        return visible(f"{self.place}: {self.why}").replace("\n", " ")


def read_records(folder: Path, *, any_schema: bool = False) -> tuple[list[Record], list[LeftOut]]:
    """Every run at or below `folder`, in order of ids, and what looks like one and is left out.

    Left out: what `whole.read_run` refuses, of another schema version unless `any_schema`, and a run whose
    contents differ from those of an earlier run with the same id. ValueError where there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no finished run there, nor such a folder; give a folder with run directories")
    reader = _Reader(any_schema)
    for directory in _run_directories(folder):
        reader.take(directory.name, directory, str(directory), partial(_read_directory, directory, any_schema))
    for file in sorted(folder.rglob(PACKED)):
        reader.take_packed(file)
    return reader.result()


def read_directories(directories: Iterable[Path]) -> tuple[list[Record], list[LeftOut]]:
    """The records of these run directories, and what is left out, as `read_records` gives them."""
    reader = _Reader(any_schema=False)
    for directory in directories:
        reader.take(directory.name, directory, str(directory), partial(_read_directory, directory, False))
    return reader.result()


class _Reader:
    def __init__(self, any_schema: bool) -> None:
        self._any_schema = any_schema
        self._records: dict[str, Record] = {}
        self._left_out: list[LeftOut] = []

    def result(self) -> tuple[list[Record], list[LeftOut]]:
        return [self._records[name] for name in sorted(self._records)], self._left_out

    def take(self, name: str, place: Path, where: str, read: Callable[[], tuple[Any, Any, str]]) -> None:
        try:
            record = _record(name, place, *read(), any_schema=self._any_schema)
            if (known := self._records.setdefault(name, record)).sha256 != record.sha256:
                raise ValueError(f"it says otherwise than {known.place}, which has the same id; keep one of them")
        except ValueError as error:
            self._left_out.append(LeftOut(where, str(error)))

    def take_packed(self, file: Path) -> None:
        try:
            lines = _lines(file)
        except ValueError as error:
            self._left_out.append(LeftOut(str(file), str(error)))
            return
        for number, line in enumerate(lines, start=1):
            name = _id_of(line)
            self.take(name, file, f"{file}, line {number} ({name})", partial(_read_line, line))


def read_failures(folder: Path) -> tuple[dict[str, dict[str, Any]], list[LeftOut]]:
    """Records by run id of the jobs at or below `folder` that failed or were refused (`uvm_kv.store.failures`), in
    order of ids, and what looks like one and is left out."""
    found: dict[str, dict[str, Any]] = {}
    left_out: list[LeftOut] = []

    def take(name: str, where: str, record: Any) -> None:
        try:
            found[name] = check_failure(record, "it")
        except ValueError as error:
            left_out.append(LeftOut(where, f"foreign: it is no record of a job that failed ({error})"))

    for name, file in failure_files(folder).items():
        try:
            take(name, str(file), parse_json(file.read_bytes()))
        except (OSError, ValueError) as error:
            left_out.append(LeftOut(str(file), f"damaged: {error}"))
    for file in sorted(folder.rglob(PACKED_FAILURES)):
        try:
            lines = _lines(file)
        except ValueError as error:
            left_out.append(LeftOut(str(file), str(error)))
            continue
        for number, line in enumerate(lines, start=1):
            it = line if isinstance(line, dict) else {}
            name = _id_of(it)
            take(name, f"{file}, line {number} ({name})", it.get("record") if "id" in it else None)
    return {name: found[name] for name in sorted(found)}, left_out


@dataclass(frozen=True)
class SweepRecords:
    """The runs and failures of one sweep."""

    argv: list[str]
    """The command of the sweep."""
    records: list[Record]
    failures: dict[str, dict[str, Any]]
    """Failures by run id."""
    left_out: list[LeftOut]


def read_sweep(folder: Path) -> SweepRecords:
    """The sweep whose report is in `folder`. ValueError where none of its runs is there."""
    file = folder / REPORT_RUNS
    try:
        told = check_fields(parse_json(file.read_bytes()), SWEEP, SWEEP, "it")
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); run the sweep again, which keeps its runs") from None
    experiment = folder.resolve().parent.parent
    records, left_out = read_directories(experiment / name for name in told["runs"])
    if not records:
        raise ValueError(f"{file}: none of its {len(told['runs'])} runs is in {experiment}; run the sweep again")
    failures, more = read_failures(experiment)
    mine = {name: it for name, it in failures.items() if name in told["failed"]}
    return SweepRecords(told["argv"], records, mine, [*left_out, *more])


ID_OF_RUN = Kind("an id of a run", lambda x: isinstance(x, str) and RUN_ID.fullmatch(x) is not None)
SWEEP = {"argv": list_of(ANY_TEXT), "runs": list_of(ID_OF_RUN), "failed": list_of(ID_OF_RUN)}


def codes(records: Iterable[Record]) -> list[str]:
    """A line for every runner whose runs several versions of the code made: how many by which."""
    found: dict[str, Counter[str]] = {}
    for record in records:
        if record.code is not None:
            found.setdefault(str(record.summary.get("runner")), Counter())[record.code] += 1
    several = {runner: counts for runner, counts in found.items() if len(counts) > 1}
    return [
        f"runs with runner={runner} were made by {len(counts)} versions of the code ("
        + ", ".join(f"{count} by {code}" for code, count in counts.most_common())
        + ")"
        for runner, counts in several.items()
    ]


def pack(records: Iterable[Record], failures: dict[str, dict[str, Any]], folder: Path) -> None:
    """Write them as a packed set into `folder`. The manifests go without what is about the machine's owner and not
    about the result: host name and folders in the command."""
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(records, key=lambda record: record.id)
    lines = [{"id": r.id, "summary": r.summary, "manifest": _public(r.manifest)} for r in ordered]
    write_gzip(folder / PACKED, (_compact(line) for line in lines))
    if failures:
        told = [{"id": name, "record": _public(record)} for name, record in sorted(failures.items())]
        write_gzip(folder / PACKED_FAILURES, (_compact(line) for line in told))
    else:
        (folder / PACKED_FAILURES).unlink(missing_ok=True)  # Of a set that was there before.


def _public(manifest: dict[str, Any]) -> dict[str, Any]:
    argv = [word for word in manifest["argv"] if not word.startswith("results_dir=")]
    public = manifest | {"argv": argv}
    public.pop("files_sha256", None)  # Of files that are not in the set.
    if "machine" in public:
        public["machine"] = {key: value for key, value in public["machine"].items() if key != "host"}
    return public


def _compact(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _run_directories(folder: Path) -> list[Path]:
    """What is, or looks like, a run directory: with a summary.json, or named as a run is."""
    found = {path.parent for path in folder.rglob("summary.json")}
    if RUN_ID.fullmatch(folder.name):
        found.add(folder)
    for path in folder.rglob("*-r*"):
        name = path.name.removeprefix(TEMPORARY)
        if RUN_ID.fullmatch(path.name) or (name != path.name and RUN_ID.match(name) and path.is_dir()):
            found.add(path)
    return sorted(path for path in found if not is_set_aside(path))


def _read_directory(directory: Path, any_schema: bool) -> tuple[Any, Any, str]:
    if any(part.startswith(TEMPORARY) for part in directory.parts):
        raise ValueError("half-written: a job that is under way or was killed; the same command runs it again")
    try:
        return read_run(directory, any_schema=any_schema)
    except ValueError as error:
        raise ValueError(f"{error}; its command sets it aside and runs it again") from None


def _id_of(line: Any) -> str:
    name = line.get("id") if isinstance(line, dict) else None
    return name if isinstance(name, str) and ID.fullmatch(name) else "?"


def _read_line(line: Any) -> tuple[Any, Any, str]:
    if not (isinstance(line, dict) and isinstance(line.get("summary"), dict)):
        raise ValueError("foreign: it is no line of a packed set")
    if _id_of(line) == "?":
        raise ValueError(f"foreign: its id is {short(line.get('id'))}")
    return line["summary"], line.get("manifest"), hashlib.sha256(encode_json(line["summary"])).hexdigest()


def _lines(file: Path) -> list[Any]:
    try:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            return [parse_json(line) for line in lines]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"damaged: {error}; take it from the repository again") from None


def _record(name: str, place: Path, summary: Any, manifest: Any, sha256: str, *, any_schema: bool) -> Record:
    summary, manifest = check_run(name, summary, manifest, sha256, any_schema=any_schema)
    return Record(name, place, summary, manifest, sha256)
