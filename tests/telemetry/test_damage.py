"""Damaged run directories: one function says so for everyone, and they are set aside, not deleted."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from uvm_kv.job.build import Job, is_done, run_job
from uvm_kv.store import directories as store
from uvm_kv.store import whole as whole_run
from uvm_kv.store.records import read_directories, read_records

GIVEN = ("batch_size=2", "max_steps=3")
FILES = ("summary.json", "manifest.json", "config.yaml", "steps.parquet", "requests.parquet")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A finished run, and one of another batch beside it."""
    folder = tmp_path_factory.mktemp("whole")
    run_job(jobs.job(folder, "batch_size=3", "max_steps=3"), argv=["test"])
    job = jobs.job(folder, *GIVEN)
    run_job(job, argv=["test"])
    return job


@pytest.fixture
def job(whole: Job, tmp_path: Path) -> Job:
    """The same in a place of its own."""
    shutil.copytree(whole.directory.parent, tmp_path / "test")
    return dataclasses.replace(whole, directory=tmp_path / "test" / whole.directory.name)


@pytest.fixture
def run(job: Job) -> Path:
    return job.directory


def other(run: Path) -> Path:
    return next(path for path in sorted(run.parent.iterdir()) if path != run)


def cut(name: str) -> Callable[[Path], Any]:
    return lambda d: (d / name).write_bytes((d / name).read_bytes()[:-20])


def garble(name: str) -> Callable[[Path], Any]:
    def spoil(d: Path) -> None:
        content = bytearray((d / name).read_bytes())
        content[len(content) // 2] ^= 0x01
        (d / name).write_bytes(content)

    return spoil


def change(name: str, **values: Any) -> Callable[[Path], Any]:
    return lambda d: (d / name).write_text(json.dumps(json.loads((d / name).read_text()) | values))


def replace(run: Path, what: Callable[[Path], Any]) -> None:
    shutil.rmtree(run)
    what(run)


SPOILS: dict[str, Callable[[Path], Any]] = {
    **{f"no {name}": (lambda d, name=name: (d / name).unlink()) for name in FILES},
    **{f"empty {name}": (lambda d, name=name: (d / name).write_bytes(b"")) for name in FILES},
    **{f"truncated {name}": cut(name) for name in FILES},
    **{f"garbled {name}": garble(name) for name in FILES if name != "manifest.json"},
    **{f"{name} is a folder": (lambda d, name=name: ((d / name).unlink(), (d / name).mkdir())) for name in FILES},
    **{f"{name} is no text": (lambda d, name=name: (d / name).write_bytes(b"\xff\xfe\x00")) for name in FILES},
    "summary is a list": lambda d: (d / "summary.json").write_text("[]"),
    "summary is nested without end": lambda d: (d / "summary.json").write_text("[" * 200_000),
    "summary of another run": lambda d: shutil.copy(other(d) / "summary.json", d),
    "summary of another version": change("summary.json", schema_version=0),
    "manifest is an empty object": lambda d: (d / "manifest.json").write_text("{}"),
    "manifest with another hash": change("manifest.json", summary_sha256="0" * 64),
    "manifest of another run": lambda d: shutil.copy(other(d) / "manifest.json", d),
    "hashes are no object": change("manifest.json", files_sha256=3),
    "all files of another run": lambda d: replace(d, lambda it: shutil.copytree(other(it), it)),
    "an empty folder": lambda d: replace(d, Path.mkdir),
    "a file in its place": lambda d: replace(d, lambda it: it.write_text("x")),
    "a link to nothing": lambda d: replace(d, lambda it: it.symlink_to("nowhere")),
    "a link to itself": lambda d: replace(d, lambda it: it.symlink_to(it.name)),
}


@pytest.mark.parametrize("what", SPOILS)
def test_what_is_damaged_is_no_run_for_anyone_and_is_set_aside(job: Job, what: str) -> None:
    run = job.directory
    neighbour = other(run)
    SPOILS[what](run)
    assert not whole_run.is_complete(run) and not is_done(job)
    records, left_out = read_records(run.parent)
    assert [record.place for record in records] == [neighbour]
    assert os.path.islink(run) or [it.place for it in left_out] == [str(run)]
    (told,) = read_directories([run])[1]
    assert len(str(told).splitlines()) == 1
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} if run.is_dir() else {}
    line = whole_run.set_aside(run)
    aside = run.with_name(f"{run.name}.damaged")
    assert line is not None and f"was set aside as {aside.name}, and is run again: " in line
    assert len(line.splitlines()) == 1
    assert not os.path.lexists(run) and os.path.lexists(aside)
    assert {aside / p.relative_to(run): content for p, content in before.items()} == {
        p: p.read_bytes() for p in aside.rglob("*") if p.is_file()
    }
    assert read_records(run.parent) == (records, []) and whole_run.completed_runs(run.parent) == [neighbour]


@pytest.mark.parametrize("what", ["truncated steps.parquet", "a file in its place", "all files of another run"])
def test_it_is_run_again_as_it_was(job: Job, what: str) -> None:
    run = job.directory
    content = (run / "summary.json").read_bytes()
    for number in ("", "-2"):
        SPOILS[what](run)
        run_job(job, argv=["again"])
        assert is_done(job) and (run / "summary.json").read_bytes() == content
        assert os.path.lexists(run.with_name(f"{run.name}.damaged{number}"))


def test_what_cannot_be_read_is_damaged(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert whole_run.damage(run) == "damaged: it cannot be read (Permission denied)"


def test_a_whole_run_and_an_empty_place_are_left_alone(run: Path, tmp_path: Path) -> None:
    assert whole_run.set_aside(run) is None and whole_run.is_complete(run)
    assert whole_run.damage(tmp_path / "nothing") is None and not whole_run.is_complete(tmp_path / "nothing")
    (run / "notes.txt").write_text("a user's")
    assert whole_run.is_complete(run)


@pytest.mark.parametrize("name", ["id", "files_sha256", "summary_sha256"])
def test_taking_a_hash_away_is_no_way_around_its_check(run: Path, name: str) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest[name]
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert whole_run.damage(run, any_schema=True) == "damaged: its manifest.json lacks the run's id or hashes"


def test_files_are_on_the_disk_before_their_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files and their folder are synced, then renamed, then the folder of the new name is synced."""
    done: list[str] = []
    monkeypatch.setattr(store, "_sync", lambda path: done.append(path.name))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, target: (done.append("rename"), rename(self, target))[1])
    job = jobs.job(tmp_path, *GIVEN)
    run_job(job, argv=[])
    *files, folder, renamed, parent = done
    assert sorted(files) == sorted(FILES)
    assert folder.startswith(whole_run.TEMPORARY) and renamed == "rename" and parent == job.directory.parent.name
