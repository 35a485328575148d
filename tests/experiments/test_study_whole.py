"""A sweep that broke down, or some of whose points failed, is said to be so and does not become the reference set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import jobs
from uvm_kv.commands import study
from uvm_kv.job.build import identity, run_job
from uvm_kv.store.failures import write_failure
from uvm_kv.store.records import read_failures
from uvm_kv.sweep.progress import Event, SweepEnd

Leave = Callable[[Path], None]


def fail(folder: Path, *, refused: bool, error: str = "RuntimeError: it broke") -> None:
    job = jobs.job(folder, "batch_size=64")
    said = identity(job)
    write_failure(folder / "b0", identity=said, error=error, tried=True, argv=[], git_sha=None, refused=refused)


def dead(_: Path) -> None:
    """A sweep that was killed leaves nothing of its own."""


def half(folder: Path) -> None:
    SweepEnd(2, 1, 0, 0).write(folder)


def unrecorded(folder: Path) -> None:
    SweepEnd.of(2, [Event("done", "a", "somewhere"), Event("failed", "b", error="batch_size=0")]).write(folder)


def broken(folder: Path) -> None:
    SweepEnd.of(2, [Event("done", "a", "somewhere"), Event("failed", "b", "somewhere")]).write(folder)
    fail(folder, refused=False)


BROKEN = [
    (dead, "the sweep did not come to its end (exit status 137)"),
    (half, "only 1 of 2 jobs ended"),
    (unrecorded, "1 of 2 jobs failed, and were not refused"),
    (broken, "1 of 2 jobs failed, and were not refused, such as: RuntimeError: it broke"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One short run."""
    job = jobs.job(tmp_path_factory.mktemp("runs"), "workload.prompt_tokens=64", "workload.output_tokens=8")
    run_job(job, argv=["test"])
    return job.directory


@pytest.fixture
def ask(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The study of one experiment whose sweep makes one run and leaves what it is told to."""

    def run(leave: Leave, *more: str, status: int = 0) -> int:
        def run_experiment(name: str, folder: Path) -> int:
            (folder / name).mkdir(parents=True, exist_ok=True)
            if not (folder / name / made.name).exists():
                (folder / name / made.name).symlink_to(made)
            SweepEnd.clear(folder / name)
            leave(folder / name)
            return status

        monkeypatch.setattr(study, "run_experiment", run_experiment)
        where = ("--results", str(tmp_path / "runs"), "--reference", str(tmp_path / "reference"))
        return study.main(["energy", *where, *more])

    return run


def whole(folder: Path) -> None:
    SweepEnd(1, 1, 0, 0).write(folder)


@pytest.mark.parametrize(("leave", "said"), BROKEN)
def test_what_is_not_whole_is_said_and_is_no_reference(
    ask: Callable[..., int], leave: Leave, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(leave, "--update", status=137) == 1
    assert not (tmp_path / "reference").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"  not whole: {said} (") and line.endswith("; the reference stays as it is")


def test_runs_that_agree_are_not_enough(ask: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(whole, "--update") == 0
    assert ask(whole) == 0
    capsys.readouterr()
    assert ask(half) == 1
    assert "  not whole: only 1 of 2 jobs ended" in capsys.readouterr().err


def test_refused_points_belong_to_a_whole_sweep(tmp_path: Path) -> None:
    fail(tmp_path, refused=True, error="no room")
    SweepEnd(2, 1, 1, 0).write(tmp_path)
    assert study.unfinished(tmp_path, read_failures(tmp_path)[0], 1) is None
