"""Give finished runs of schema version 2 the run ids of version 3, which count only the settings that a job heeds.

    python -m experiments.rekey FOLDER ...      run directories and packed sets below them; numbers stay as they are

The old id stays in the manifest (`formerly`), so that `uvm-kv runs OLD_ID` finds the run. A reference set's index.json
is written anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from uvm_kv.commands.study import update_reference
from uvm_kv.config.grammar import parse
from uvm_kv.config.settings import heeded, without_defaults
from uvm_kv.store.checks import ANALYTIC
from uvm_kv.store.directories import encode_json, run_id
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
    for file in sorted(folder.rglob(PACKED)):
        _rekey_packed(file.parent)
    return len(old)


def _rekey_directory(directory: Path) -> None:
    summary, manifest = (json.loads((directory / name).read_text()) for name in ("summary.json", "manifest.json"))
    name = new_id(summary, directory.name)
    content = encode_json(summary | {"schema_version": NEW})
    manifest |= {"id": name, "formerly": directory.name, "summary_sha256": hashlib.sha256(content).hexdigest()}
    (directory / "summary.json").write_bytes(content)
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    directory.rename(directory.with_name(name))


def _rekey_packed(folder: Path) -> None:
    records = [_rekeyed(record) for record in read_records(folder, any_schema=True)[0]]
    failures = {
        new_id(record, name): record | {"schema_version": NEW, "formerly": name}
        for name, record in read_failures(folder)[0].items()
        if record["schema_version"] == OLD
    }
    if not (folder.parent / INDEX).is_file():
        raise ValueError(f"{folder.parent} has no {INDEX}, so it is no reference set; give a folder of run directories")
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
