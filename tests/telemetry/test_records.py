"""Reading finished runs: what is taken, what is left out and why, packed sets."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from uvm_kv.job.build import run_job
from uvm_kv.store.failures import failure_sha256, write_failure
from uvm_kv.store.records import PACKED, PACKED_FAILURES, pack, read_failures, read_records
from uvm_kv.telemetry.summary import SCHEMA_VERSION

NOTHING_ELSE = json.dumps({"schema_version": SCHEMA_VERSION})
IDENTITY = {"model": "m", "mechanism": "device_resident", "offered_batch": 4}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for batch in (4, 8):
        job = jobs.job(folder, "mechanism=device_resident", f"batch_size={batch}", "max_steps=20")
        run_job(job, argv=["test", "results_dir=/somewhere"])
    return folder


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> list[Path]:
    shutil.copytree(finished, tmp_path / "runs")
    return sorted(path.parent for path in (tmp_path / "runs").rglob("summary.json"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values, indent=2) + "\n")


def test_whole_runs_are_read_with_the_hash_of_their_summary(runs: list[Path], tmp_path: Path) -> None:
    records, left_out = read_records(tmp_path)
    assert [r.id for r in records] == [d.name for d in runs] and left_out == []
    for record, directory in zip(records, runs, strict=True):
        assert record.sha256 == hashlib.sha256((directory / "summary.json").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda d: (d / "summary.json").unlink(), "half-written: it has no summary.json"),
        (lambda d: (d / "summary.json").write_text("{"), "half-written or damaged"),
        (lambda d: (d / "manifest.json").unlink(), "foreign: it has no manifest.json"),
        (lambda d: (d / "config.yaml").unlink(), "half-written: it has no config.yaml, so a part was deleted;"),
        (lambda d: (d / "steps.parquet").unlink(), "half-written: it has no steps.parquet"),
        (lambda d: (d / "requests.parquet").unlink(), "half-written: it has no requests.parquet"),
        (lambda d: (d / "summary.json").write_text("[1]"), "foreign"),
        (lambda d: (d / "summary.json").write_text(NOTHING_ELSE), "foreign: its summary.json has no origin"),
        (lambda d: change(d / "summary.json", schema_version=0), "schema version 0, where this version reads"),
        (lambda d: change(d / "summary.json", output_tokens_per_s=1e9), "tampered"),
        (lambda d: d.rename(d.with_name(f".tmp-{d.name}-1234")), "half-written: a job that is under way"),
    ],
)  # fmt: skip
def test_what_is_no_whole_run_is_listed_left_out_and_left_alone(
    runs: list[Path], tmp_path: Path, spoil: Any, why: str
) -> None:
    spoil(runs[0])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    records, (left_out,) = read_records(tmp_path)
    assert [r.id for r in records] == [runs[1].name]
    assert runs[0].name in str(left_out) and why in str(left_out) and len(str(left_out).splitlines()) == 1
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_tables_without_pyarrow_are_whole_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    run_job(jobs.job(tmp_path, "batch_size=4", "max_steps=5"), argv=[])
    records, left_out = read_records(tmp_path)
    assert len(records) == 1 and left_out == []


def test_an_older_version_is_taken_where_it_is_asked_for(runs: list[Path], tmp_path: Path) -> None:
    summary = runs[0] / "summary.json"
    change(summary, schema_version=0)
    change(summary.with_name("manifest.json"), summary_sha256=hashlib.sha256(summary.read_bytes()).hexdigest())
    assert len(read_records(tmp_path)[0]) == 1
    records, left_out = read_records(tmp_path, any_schema=True)
    assert len(records) == 2 and left_out == []


def test_two_runs_of_one_id_that_differ_are_not_both_used(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "z" / runs[0].name)
    assert len(read_records(tmp_path)[0]) == 2  # The same run twice is one run.
    summary = tmp_path / "z" / runs[0].name / "summary.json"
    change(summary, output_tokens_per_s=1.0)
    change(summary.with_name("manifest.json"), summary_sha256=hashlib.sha256(summary.read_bytes()).hexdigest())
    records, (left_out,) = read_records(tmp_path)
    assert len(records) == 2 and "same id" in str(left_out)


def test_a_packed_set_reads_as_its_runs_and_names_no_machine(runs: list[Path], tmp_path: Path) -> None:
    records, _ = read_records(tmp_path)
    name = "0" * 12 + "-r0"
    write_failure(runs[0].with_name(name), identity=IDENTITY, error="no room", tried=True, argv=["a"], git_sha=None)
    failures, _ = read_failures(tmp_path)
    assert list(failures) == [name]
    for name in "ab":
        pack(reversed(records), failures, tmp_path / name)
    assert (tmp_path / "a" / PACKED).read_bytes() == (tmp_path / "b" / PACKED).read_bytes()
    packed, left_out = read_records(tmp_path / "a")
    assert left_out == []
    assert [(r.id, r.summary, r.sha256) for r in packed] == [(r.id, r.summary, r.sha256) for r in records]
    assert "host" not in packed[0].manifest["machine"] and packed[0].manifest["argv"] == ["test"]
    assert read_failures(tmp_path / "a") == (failures, [])
    pack(records, {}, tmp_path / "a")
    assert read_failures(tmp_path / "a") == ({}, []), "those of the set that was there before"


def test_a_failure_s_hash_is_of_the_point_and_not_of_the_attempt(tmp_path: Path) -> None:
    hashes = []
    for error, argv in (("no room", ["a"]), ("no room", ["b"]), ("no memory", ["a"])):
        write_failure(tmp_path / "x-r0", identity=IDENTITY, error=error, tried=True, argv=argv, git_sha=argv[0])
        hashes.append(failure_sha256(read_failures(tmp_path)[0]["x-r0"]))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_failure_s_record_that_is_damaged_or_foreign_is_listed_and_left_out(tmp_path: Path) -> None:
    write_failure(tmp_path / "x-r0", identity=IDENTITY, error="no room", tried=True, argv=[], git_sha=None)
    (tmp_path / "y-r0.failed.json").write_text('{"error": ')
    (tmp_path / "z-r0.failed.json").write_text("{}")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / PACKED_FAILURES).write_bytes(b"\x1f\x8b")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / PACKED_FAILURES).write_bytes(gzip.compress(b'[1]\n{"id": "q", "record": {}}\n'))
    failures, left_out = read_failures(tmp_path)
    assert list(failures) == ["x-r0"]
    said = [str(it).removeprefix(f"{tmp_path}/") for it in left_out]
    assert [line.partition(":")[0] for line in said] == [
        "y-r0.failed.json",
        "z-r0.failed.json",
        f"cut/{PACKED_FAILURES}",
        f"odd/{PACKED_FAILURES}, line 1 (?)",
        f"odd/{PACKED_FAILURES}, line 2 (q)",
    ]


def test_a_packed_set_that_was_changed_or_cut_off(runs: list[Path], tmp_path: Path) -> None:
    assert len(runs) == 2
    pack(read_records(tmp_path)[0], {}, tmp_path / "packed")
    file = tmp_path / "packed" / PACKED
    lines = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    lines[0]["summary"]["output_tokens_per_s"] = 1e9
    file.write_bytes(gzip.compress(b"\n".join(json.dumps(line).encode() for line in [*lines, {"a": 1}, [2]])))
    records, left_out = read_records(tmp_path / "packed")
    assert [r.id for r in records] == [lines[1]["id"]]
    assert ["tampered" in left_out[0].why, *("foreign" in it.why for it in left_out[1:])] == [True, True, True]
    file.write_bytes(file.read_bytes()[:-40])
    records, (left_out_file,) = read_records(tmp_path / "packed")
    assert records == [] and "damaged" in str(left_out_file)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished run there"):
        read_records(tmp_path / "nowhere")
