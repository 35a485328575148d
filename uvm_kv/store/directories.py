"""Run directories: written under a temporary name, synced and renamed, so that what has its name is whole.

    <results_dir>/<experiment>/<run id>/
        config.yaml  manifest.json  steps.parquet  requests.parquet  summary.json  [plans.jsonl.gz]  [outputs.jsonl]

summary, steps and requests hold no path and no wall clock, so that equal runs are byte-identical; those are in the
manifest. Without pyarrow the tables are `.jsonl.gz` of the same columns. `uvm_kv.store.whole` decides whether a
directory is a whole run.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import platform
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from uvm_kv.kvcache.ops import MemoryCounters
from uvm_kv.sched.plan import StepOutput, StepPlan, StepTiming
from uvm_kv.store.checks import (
    ANY_TEXT,
    COUNT,
    NULL,
    check_fields,
    check_manifest,
    check_summary,
    check_table,
    list_of,
    parse_json,
    short,
)
from uvm_kv.store.whole import TEMPORARY, is_complete, set_aside
from uvm_kv.telemetry.recorder import REQUEST_COLUMNS, STEP_COLUMNS, Table

REPORT_RUNS = "runs.json"
"""In the folder of a sweep's report: {"argv": what was typed, "runs": run ids, "failed": ids of those that failed}."""


def run_id(determining: dict[str, Any], repeat: int) -> str:
    """Hash of everything that determines the result, and the repeat number."""
    text = json.dumps(determining, sort_keys=True, separators=(",", ":"))
    return f"{hashlib.sha256(text.encode()).hexdigest()[:12]}-r{repeat}"


def write_run(
    directory: Path,
    *,
    config_yaml: str,
    manifest: dict[str, Any],
    steps: Table,
    requests: Table,
    summary: dict[str, Any],
    plans: Iterable[tuple[StepPlan, StepOutput]] | None = None,
    outputs: list[dict[str, Any]] | None = None,
    replace: bool = False,
) -> bool:
    """Write a whole run directory or nothing. `replace` a whole one of that name (rerun); without it, False if another
    process finished the same run first. What has the name and is no whole run is set aside."""
    parent = directory.parent
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(directory)
    temporary = temporary_path(directory)
    try:
        temporary.mkdir()
        (temporary / "config.yaml").write_text(config_yaml)
        _write_table(temporary / "steps", steps)
        _write_table(temporary / "requests", requests)
        if plans is not None:
            lines = (json.dumps([plan.to_json(), output.to_json()]) for plan, output in plans)
            write_gzip(temporary / "plans.jsonl.gz", lines)
        if outputs is not None:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in outputs)
            (temporary / "outputs.jsonl").write_text("".join(lines), encoding="utf-8")
        hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(temporary.iterdir())}
        content = encode_json(summary)
        told = {"summary_sha256": hashlib.sha256(content).hexdigest(), "files_sha256": hashes}
        (temporary / "manifest.json").write_bytes(encode_json({"id": directory.name, **manifest, **told}))
        (temporary / "summary.json").write_bytes(content)
        _sync_files(temporary)
        return _publish(temporary, directory, replace)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, directory: Path, replace: bool) -> bool:
    set_aside(directory)
    if replace:
        old = temporary.with_name(temporary.name + "-old")
        with contextlib.suppress(FileNotFoundError):  # Another process may be replacing it too.
            directory.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        temporary.rename(directory)
    except OSError:
        if is_complete(directory):
            return False
        raise
    _sync(directory.parent)
    return True


def _sync_files(folder: Path) -> None:
    """The files of a folder, and then the folder, to the disk: a rename must not get there before them."""
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # Some file systems cannot sync a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def machine() -> str:
    """The scope in which a pid names one process: the host and, because containers may share its name, the process
    namespace."""
    try:
        namespace = f"-{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # Not on Linux.
        namespace = ""
    return platform.node() + namespace


def temporary_path(path: Path) -> Path:
    """The temporary path at which this process writes what is to become `path`."""
    return path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}@{machine()}")


def check_writable(folder: Path, option: str) -> None:
    """Make the folder, and see that files can be written there. ValueError names the option, `results_dir=` or
    `--output `, as it is typed before a folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise ValueError(
            f"{option}{folder} cannot be written ({error.strerror or error}); give another: {option}DIR"
        ) from None


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A place for files of `folder` that belong together: they replace those there when all are written, or not."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder / "files")
    temporary = temporary_path(folder / "files")
    temporary.mkdir()
    try:
        yield temporary
        _sync_files(temporary)
        for file in sorted(temporary.iterdir()):
            file.replace(folder / file.name)
        _sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_abandoned(path: Path) -> None:
    """Delete what killed processes of this machine left of `path`. The files of other machines on a shared file system
    stay, because this machine cannot tell whether their processes are alive."""
    prefix = f"{TEMPORARY}{path.name}-"
    for left in path.parent.glob(f"{prefix}*@{machine()}*"):
        pid, _, where = left.name.removeprefix(prefix).removesuffix("-old").partition("@")
        if where == machine() and not (pid.isdigit() and int(pid) != os.getpid() and is_alive(int(pid))):
            shutil.rmtree(left, ignore_errors=True)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def encode_json(value: dict[str, Any]) -> bytes:
    """The bytes of summary.json and manifest.json as they are written; hashes are taken of these bytes."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """An object of a results file. ValueError for anything else, and for numbers that are not finite."""
    try:
        value = parse_json(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError(f"it is {short(value)}, not an object of names and values")
    except ValueError as error:
        raise ValueError(f"{path}: not readable ({error}); delete its run directory and run again") from None
    return value


def read_summary(directory: Path) -> dict[str, Any]:
    """summary.json of a run directory, its fields checked. ValueError where it is none."""
    return check_summary(read_json(path := directory / "summary.json"), str(path))


def read_manifest(directory: Path) -> dict[str, Any]:
    """manifest.json of a run directory, its fields checked. ValueError where it is none."""
    return check_manifest(read_json(path := directory / "manifest.json"), str(path))


def read_outputs(directory: Path) -> list[dict[str, Any]]:
    """outputs.jsonl of a run with a real model; empty where there is none."""
    path = directory / "outputs.jsonl"
    if not path.is_file():
        return []
    try:
        # Lines end at \n alone: text may hold what else Unicode calls a line end.
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [parse_json(line) for line in lines if line]
        return [check_fields(row, OUTPUT, ("request_id", "output_ids"), "a line") for row in rows]
    except ValueError as error:
        raise ValueError(f"{path}: not readable ({error}); run it again") from None


STEP_OUTPUT = {
    "timing": list_of(COUNT, len(StepTiming._fields)),
    "counters": list_of(COUNT | NULL, len(MemoryCounters._fields)),
    "token_ids": list_of(COUNT) | NULL,
}
OUTPUT = {"request_id": COUNT, "output_ids": list_of(COUNT), "text": ANY_TEXT}


def write_gzip(path: Path, lines: Iterable[str]) -> None:
    """`lines`: without their ends."""
    # No name and no time in the header: equal content gives equal bytes.
    with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
        with io.TextIOWrapper(packed, "utf-8", newline="\n") as text:
            for line in lines:
                text.write(line + "\n")


def _write_table(stem: Path, table: Table) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        rows = (json.dumps(dict(zip(table, row, strict=True))) for row in zip(*table.values(), strict=True))
        write_gzip(stem.with_suffix(".jsonl.gz"), rows)
        return
    kinds = {name: pa.bool_() if name == "measured" else pa.int64() for name in table}
    columns = {name: pa.array(values, kinds[name]) for name, values in table.items()}
    pq.write_table(pa.table(columns), stem.with_suffix(".parquet"))


def read_table(directory: Path, name: str) -> Table:
    """`steps` or `requests` of a run, whichever way it was written. ValueError where it is damaged."""
    parquet, packed = directory / f"{name}.parquet", directory / f"{name}.jsonl.gz"
    path = parquet if parquet.is_file() else packed
    try:
        table = _read_parquet(parquet) if path is parquet else _read_packed(packed)
    except FileNotFoundError:
        raise ValueError(f"{directory}: it holds neither {name}.parquet nor {name}.jsonl.gz") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise ValueError(f"{path}: not readable ({reason}); run it again") from None
    steps = name == "steps"
    check_table(table, STEP_COLUMNS if steps else REQUEST_COLUMNS, STEP_NEEDED if steps else REQUEST_NEEDED, str(path))
    return table


STEP_NEEDED = ("step", "start_ns", "end_ns", "num_running", "num_scheduled_tokens", "num_output_tokens")
REQUEST_NEEDED = ("request_id", "prompt_tokens", "output_tokens", "arrival_ns", "measured")
"""Columns of which each row is known."""


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError("reading it needs pyarrow; install it with pip install pyarrow") from None
    try:
        columns: Table = pq.read_table(path).to_pydict()
    except pa.ArrowException as error:  # Some are no ValueError.
        raise ValueError(str(error)) from None
    return columns


def _read_packed(path: Path) -> Table:
    table: Table = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError(f"a line is {short(row)}, not an object of names and values")
            for key, value in row.items():
                table.setdefault(key, []).append(value)
    return table


def read_plans(directory: Path) -> Iterator[tuple[StepPlan, StepOutput]]:
    """The recorded plans of a run made with record_plans=true."""
    path = directory / "plans.jsonl.gz"
    if not path.is_file():
        raise ValueError(f"replay.path={directory}: it holds no plans.jsonl.gz; record one with record_plans=true")
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                number += 1
                plan, output = parse_json(line)
                yield (
                    StepPlan.from_json(plan),
                    StepOutput.from_json(check_fields(output, STEP_OUTPUT, STEP_OUTPUT, "it")),
                )
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{path}, line {number}: not a recorded step ({error}); record the run again") from None
