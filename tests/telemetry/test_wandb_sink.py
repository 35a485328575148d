"""The mirror to wandb: a finished run is never failed by it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.jobs import job
from uvm_kv.config.build import is_done, run_job
from uvm_kv.telemetry.store import read_table
from uvm_kv.telemetry.wandb_sink import MAX_POINTS, step_series

SMALL = ("batch_size=4", "workload.prompt_tokens=64", "workload.output_tokens=256", "tracking=wandb")


def test_a_tracker_that_fails_leaves_the_run_finished_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    one = job(tmp_path, *SMALL)
    run_job(one, argv=[])
    assert is_done(one)
    assert "tracking=wandb failed" in capsys.readouterr().err


def test_step_series_averages_long_runs(tmp_path: Path) -> None:
    one = job(tmp_path, *SMALL[:-1])
    run_job(one, argv=[])
    steps = read_table(one.directory, "steps")
    rows = step_series(steps)
    assert len(rows) == MAX_POINTS < len(steps["step"])
    assert rows[-1]["step"] == len(steps["step"]) - 1
    times = [row["time_s"] for row in rows]
    assert times == sorted(times)
    assert all(0 < row["num_running"] <= 4 for row in rows)
