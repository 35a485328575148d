"""Give finished runs of schema version 2 the run ids of version 3, which count only the settings that a job heeds.

    python -m experiments.rekey FOLDER ...      run directories and packed sets below them; numbers stay as they are

The old id stays in the manifest (`formerly`), so that `uvm-kv runs OLD_ID` finds the run. A reference set's index.json
is written anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from uvm_kv.commands.study import update_reference
from uvm_kv.config.grammar import parse
from uvm_kv.config.settings import heeded, without_defaults
from uvm_kv.store.checks import ANALYTIC
from uvm_kv.store.directories import encode_json, run_id, temporary_path
from uvm_kv.store.failures import failure_files
from uvm_kv.store.records import PACKED, Record, read_failures, read_records
from uvm_kv.study.publish import INDEX
from uvm_kv.telemetry.summary import SCHEMA_VERSION
from uvm_kv.types import OUR_ENGINE

OLD, NEW = 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.rekey", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--json", action="store_true", help="the number of runs by folder, as one JSON object")
    options, done = parse(parser, arguments), {}
    try:
        for folder in options.folders:
            done[str(folder)] = _rekey(folder)
            if not options.json:
                print(f"{folder}: {done[str(folder)]} runs have new ids")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(done, indent=1))
    return 0


def new_id(told: dict[str, Any], old: str) -> str:
    """The run id of what a summary, or a record of a failure, tells of its job."""
    values = {**told["setting"], **told["variant"]}
    per_client = values.pop("workload.requests_per_client")
    values["workload.num_requests"] = None if per_client is None else round(per_client * told["offered_batch"])
    mechanism = told["mechanism"] if told.get("engine", OUR_ENGINE) == OUR_ENGINE else "custom"
    values |= {"batch_size": told["offered_batch"], "seed": told["seed"], "mechanism": mechanism}
    determining = without_defaults(heeded(values)) | {"schema_version": NEW}
    return run_id(determining, int(old.rpartition("-r")[2]))


def _rekey(folder: Path) -> int:
    assert SCHEMA_VERSION == NEW, "a later version has other ids"
    records, left_out = read_records(folder, any_schema=True)
    for it in left_out:
        print(f"left out: {it}", file=sys.stderr)
    old = [record for record in records if record.summary["schema_version"] == OLD]
    for directory in (record.place for record in old if record.place.name != PACKED):
        _rekey_directory(directory)
    for name, file in failure_files(folder).items():
        _rekey_failure(name, file)
    for file in sorted(folder.rglob(PACKED)):
        _rekey_packed(file.parent)
    return len(old)


def _rekey_directory(directory: Path) -> None:
    """Copy it under its new name, then remove it: a kill leaves one of the two whole."""
    summary, manifest = (json.loads((directory / name).read_text()) for name in ("summary.json", "manifest.json"))
    target = directory.with_name(new_id(summary, directory.name))
    if not target.exists():
        content = encode_json(summary | {"schema_version": NEW})
        manifest |= {"id": target.name, "formerly": directory.name}
        manifest["summary_sha256"] = hashlib.sha256(content).hexdigest()
        copy = temporary_path(target)
        shutil.copytree(directory, copy)
        (copy / "summary.json").write_bytes(content)
        (copy / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        copy.rename(target)
    shutil.rmtree(directory)


def _rekey_failure(name: str, file: Path) -> None:
    record = json.loads(file.read_text())
    if record.get("schema_version") == OLD:
        new = _rekeyed_failure(name, record)
        temporary = temporary_path(file)
        temporary.write_text(json.dumps(new, indent=2) + "\n")
        temporary.replace(file.with_name(file.name.replace(name, new_id(record, name))))
        file.unlink(missing_ok=True)


def _rekeyed_failure(name: str, record: dict[str, Any]) -> dict[str, Any]:
    return record | {"schema_version": NEW, "formerly": name}


def _rekey_packed(folder: Path) -> None:
    if not (folder.parent / INDEX).is_file():
        raise ValueError(f"{folder.parent} has no {INDEX}, so it is no reference set; give a folder of run directories")
    records = [_rekeyed(record) for record in read_records(folder, any_schema=True)[0]]
    failures = {}
    for name, record in read_failures(folder)[0].items():
        is_old = record["schema_version"] == OLD
        failures[new_id(record, name) if is_old else name] = _rekeyed_failure(name, record) if is_old else record
    update_reference(folder.name, records, failures, folder.parent)


def _rekeyed(record: Record) -> Record:
    if record.summary["schema_version"] != OLD:
        return record
    summary = record.summary | {"schema_version": NEW}
    name = record.id if summary["origin"] == ANALYTIC else new_id(summary, record.id)
    sha256 = hashlib.sha256(encode_json(summary)).hexdigest()
    manifest = record.manifest | {"summary_sha256": sha256, "formerly": record.id}
    if "id" in manifest:
        manifest["id"] = name
    return replace(record, id=name, summary=summary, manifest=manifest, sha256=sha256)
