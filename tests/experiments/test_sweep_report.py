"""Names of sweeps, the place of their reports, and how far a sweep is."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from uvm_kv.cli import main as uvm_kv
from uvm_kv.commands.run import preflight
from uvm_kv.config.names import parse_overrides
from uvm_kv.job.build import run_job
from uvm_kv.sweep.progress import Event, SweepEnd, SweepLog, progress_line
from uvm_kv.sweep.sweep_report import LATEST, SweepReport, place_of, take_name


def place(folder: Path, *overrides: str, name: str | None = None, published: bool = False) -> SweepReport:
    return place_of(folder, name, parse_overrides(list(overrides)), published=published)


def test_a_sweep_is_named_by_its_time_and_what_it_sweeps(tmp_path: Path) -> None:
    found = place(tmp_path, "mechanism=a,b", "memory.host_kv_bytes=1,2", "seed=3")
    assert re.fullmatch(r"\d{8}-\d{6}-mechanism-memory.host_kv_bytes", found.folder.name)
    assert found.folder.parent == tmp_path / "reports" and found.end == found.folder
    assert place(tmp_path, "seed=3").folder.name.endswith("-seed")
    assert re.fullmatch(r"\d{8}-\d{6}(_\d+)?", place(tmp_path).folder.name)


def test_sweeps_of_one_second_have_places_of_their_own(tmp_path: Path) -> None:
    assert len({place(tmp_path, "seed=1,2").folder for _ in range(5)}) == 5


def test_a_published_experiment_as_it_is_keeps_its_place(tmp_path: Path) -> None:
    as_it_is = ["experiment=batch_sweep", f"results_dir={tmp_path}", "rerun=true", "hydra/launcher=basic"]
    assert place(tmp_path, *as_it_is, published=True) == SweepReport(tmp_path / "report", tmp_path)
    assert place(tmp_path, *as_it_is, "seed=1", published=True).folder.parent == tmp_path / "reports"
    assert place(tmp_path, *as_it_is, name="mine", published=True).folder == tmp_path / "reports" / "mine"


@pytest.mark.parametrize("name", ["", "a b", "../x", "a/b", ".hidden", LATEST, "a,b", "x" * 101, "\x1b"])
def test_what_cannot_name_a_sweep_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a sweep"):
        take_name([f"name={name}"])


def test_a_name_is_not_for_hydra() -> None:
    assert take_name(["seed=1", "name=a", "model.name=b"]) == ("a", ["seed=1", "model.name=b"])
    assert take_name(["seed=1"]) == (None, ["seed=1"])


def test_the_report_of_a_sweep_is_made_again_of_its_own_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    for batch in (2, 4):
        job = jobs.job(tmp_path, f"batch_size={batch}", "max_steps=5")
        run_job(job, argv=["test"])
        made.append(job.directory)
    experiment = made[0].parent
    for name, directory in zip("ab", made, strict=True):
        typed = ["python", "-m", "experiments.run", "-m", f"max_seconds={name.encode()[0]}"]
        place(experiment, "batch_size=2", name=name).write_runs(typed, [directory.name], [])
    assert (experiment / "reports" / LATEST).resolve().name == "b"
    for name, batch in (("a", "2"), ("b", "4"), (LATEST, "4")):
        assert uvm_kv(["report", str(experiment / "reports" / name)]) == 0
        told = "".join(capsys.readouterr().out.split())
        assert f"reports/{name}/report.html" in told
        assert ("max_seconds=97" if name == "a" else "max_seconds=98") in told, "the command that is missing goes on it"
        with (experiment / "reports" / name / "points.csv").open() as lines:
            (row,) = csv.DictReader(lines)
        assert row["offered_batch"] == batch
    assert uvm_kv(["report", str(experiment)]) == 0  # All of them.
    assert len((experiment / "report" / "points.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("text", ["", "[]", '{"runs": []}', '{"argv": [], "runs": ["../x"], "failed": []}'])
def test_a_poisoned_list_of_runs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / "runs.json").write_text(text)
    assert uvm_kv(["report", str(tmp_path)]) == 2
    assert "runs.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "num_jobs", "num_runs"),
    [
        (["seed=0,1,2", "num_repeats=3"], 3, 9),
        (["num_repeats=1,3", "batch_size=2,4"], 4, 8),
        (["num_repeats=4"], 1, 4),
        (["batch_size=0,1"], 2, 2),
        (["num_repeats=0"], 1, 1),
    ],
)
def test_each_repeat_is_a_run_of_the_sweep(tmp_path: Path, words: list[str], num_jobs: int, num_runs: int) -> None:
    request = preflight(["-m", *words, f"results_dir={tmp_path}"])
    assert (request.num_jobs, request.num_runs) == (num_jobs, num_runs)


def log_of(tmp_path: Path, *events: dict[str, Any]) -> SweepLog:
    whole = [json.dumps(vars(Event(**{"status": "done", "label": "a", **event}))) for event in events]
    (tmp_path / "1@here.jsonl").write_text("".join(f"{line}\n" for line in whole))
    log = SweepLog(tmp_path)
    log.poll()
    return log


def test_progress_counts_repeats_and_never_goes_below_nothing(tmp_path: Path) -> None:
    assert progress_line(log_of(tmp_path, *[{}] * 4), 9, 30.0) == "4 done of 9 runs, about 50 s left"
    assert progress_line(log_of(tmp_path, *[{}] * 9), 9, 30.0) == "9 done of 9 runs"
    assert progress_line(log_of(tmp_path, *[{}] * 15), 6, 30.0) == "15 done of 15 runs"
    assert progress_line(log_of(tmp_path), 3, 0.0) == "0 done of 3 runs"
    refused = {"status": "failed", "error": "no", "num_runs": 3}
    assert progress_line(log_of(tmp_path, {}, refused), 6, 30.0) == "1 done, 1 failed of 6 runs, about 20 s left"


def test_a_job_that_fails_before_it_is_a_run_fails_with_all_its_repeats() -> None:
    events = [Event("done", "a", "d"), Event("failed", "b", error="no", num_runs=3)]
    assert SweepEnd.of(4, events) == SweepEnd(jobs=4, complete=1, failed=3, unrecorded=3)


def test_a_name_that_no_reader_would_show_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.name='a\\x1b\[31m' cannot name results"):
        jobs.job(tmp_path, "model.name='a\x1b[31m'")
