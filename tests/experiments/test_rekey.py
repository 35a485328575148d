"""Runs of schema version 2 get the ids of version 3, and are found by both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests import jobs
from tests.helpers import vouch
from uvm_kv.cli import main as uvm_kv
from uvm_kv.commands.rekey import main, new_id
from uvm_kv.commands.study import update_reference
from uvm_kv.job.build import identity
from uvm_kv.peers.job import run_any_job
from uvm_kv.store.failures import write_failure
from uvm_kv.store.records import read_failures, read_records

WAYS = (
    (),
    ("mechanism=pinned_balanced", "batch_size=24", "seed=3"),
    ("mechanism=managed_demand", "driver.prefetcher=none", "workload.num_requests=96"),
    ("workload=azure_conv", "scheduler=dynamic", "scheduler.window_s=2", "kv_bits=8"),
    ("model=llama3_8b", "dtype=bfloat16", "workload.start=steady", "scheduler.max_num_batched_tokens=4096"),
)


@pytest.mark.parametrize("overrides", WAYS)
def test_the_id_follows_from_the_summary(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    job = jobs.job(tmp_path, *overrides, "max_steps=3")
    summary = json.loads(json.dumps(run_any_job(job, argv=["test"])))
    assert new_id(summary, job.directory.name) == job.directory.name


def test_old_runs_are_renamed_and_found_by_both_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = jobs.job(tmp_path, "max_steps=3")
    run_any_job(job, argv=["test"])
    old = job.directory.rename(job.directory.with_name("0123456789ab-r0"))
    summary = json.loads((old / "summary.json").read_text()) | {"schema_version": 2}
    (old / "summary.json").write_text(json.dumps(summary))
    vouch(old)
    assert read_records(tmp_path)[0] == [], "of another schema version"
    assert main([str(tmp_path)]) == 0
    assert "1 runs have new ids" in capsys.readouterr().out
    ((record,), left_out) = read_records(tmp_path)
    assert left_out == [] and record.place == job.directory and record.manifest["formerly"] == old.name
    for name in (old.name, job.directory.name):
        assert uvm_kv(["runs", name, "--folder", str(tmp_path)]) == 0
        assert f"run: {job.directory}" in capsys.readouterr().out.replace("\n", "")
    assert main([str(tmp_path)]) == 0
    assert "0 runs have new ids" in capsys.readouterr().out


def test_a_second_run_loses_no_refused_point(tmp_path: Path) -> None:
    """Also of a packed set, whose failures were lost once."""
    job = jobs.job(tmp_path, "max_steps=3")
    run_any_job(job, argv=["test"])
    old = job.directory.with_name("fedcba987654-r0")
    told = identity(job) | {"schema_version": 2}
    write_failure(old, identity=told, error="no room", tried=False, argv=[], git_sha=None, refused=True)
    records, failures = read_records(tmp_path)[0], read_failures(tmp_path)[0]
    assert list(failures) == [old.name]
    reference = tmp_path / "reference"
    update_reference("test", records, failures, reference)
    for _ in range(2):
        assert main([str(tmp_path / "reference")]) == 0
        ((name, record),) = read_failures(reference)[0].items()
        assert (name, record["formerly"], record["error"]) == (job.directory.name, old.name, "no room")
        assert [it.id for it in read_records(reference)[0]] == [job.directory.name]


def test_a_loose_record_of_a_failure_is_renamed(tmp_path: Path) -> None:
    job = jobs.job(tmp_path, "max_steps=3")
    told = identity(job) | {"schema_version": 2}
    old = job.directory.with_name("fedcba987654-r0")
    write_failure(old, identity=told, error="no room", tried=True, argv=[], git_sha=None)
    assert main([str(tmp_path)]) == 0
    assert list(read_failures(tmp_path)[0]) == [job.directory.name]


def test_a_run_that_is_there_under_both_ids_is_kept_once(tmp_path: Path) -> None:
    """As a kill between the copy and the removal leaves it."""
    job = jobs.job(tmp_path, "max_steps=3")
    run_any_job(job, argv=["test"])
    old = job.directory.with_name("0123456789ab-r0")
    shutil.copytree(job.directory, old)
    summary = json.loads((old / "summary.json").read_text()) | {"schema_version": 2}
    (old / "summary.json").write_text(json.dumps(summary))
    vouch(old)
    assert main([str(tmp_path)]) == 0
    assert not old.exists() and [it.id for it in read_records(tmp_path)[0]] == [job.directory.name]
