"""Nothing that tracking does costs a report: whatever it raises is a line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from tests.helpers import REPOSITORY
from uvm_kv.job.build import run_job
from uvm_kv.sweep.progress import Event, tracked
from uvm_kv.tracking import track, wandb_sink


def finished(folder: Path) -> list[Event]:
    job = jobs.job(folder, "batch_size=2", "max_steps=3")
    run_job(job, argv=["test"])
    return [Event("done", "a", str(job.directory), tracking={"project": "p", "mode": "offline"})]


@pytest.mark.parametrize(
    "error", [RuntimeError("\x1b[31mno\nmore"), SystemExit("gone"), KeyError("key"), OSError(5, "x")]
)
def test_whatever_tracking_raises_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    def broken(*_: Any) -> track.Sent:
        raise error

    monkeypatch.setattr(track, "send_runs", broken)
    track.mirror_all(tracked(finished(tmp_path)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: tracking=wandb failed: ") and line.isprintable()


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_settings_that_wandb_refuses_are_told_once_and_try_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    class Refusal(ValueError):
        def errors(self) -> list[dict[str, Any]]:
            return [{"loc": ("base_url",), "msg": "not a URL"}]

    def refuse() -> None:
        raise Refusal("1 validation error\nbase_url\n  many lines")

    monkeypatch.setattr(wandb_sink, "_quiet_wandb", refuse)
    monkeypatch.setattr(track, "_send_run", lambda *_: pytest.fail("it cannot be sent"))
    (event,) = finished(tmp_path)
    records, _ = track.read_directories([Path(str(event.directory))])
    (problem,) = track.send_runs(records, "p", mode).problems
    assert "(WANDB_BASE_URL: not a URL)" in problem and "experiments.publish sends the runs" in problem


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_malformed_server_costs_no_report(tmp_path: Path, mode: str) -> None:
    pytest.importorskip("wandb")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", "-m", "batch_size=2", "max_steps=3", "tracking=wandb", "name=it",
         f"tracking.mode={mode}", f"results_dir={tmp_path}"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, env=os.environ | {"WANDB_BASE_URL": "nonsense"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adhoc" / "reports" / "it" / "report.html").is_file()
    last = done.stderr.splitlines()[-1]
    assert last.startswith("warning: tracking=wandb failed: ") and "WANDB_BASE_URL" in last
    assert "Traceback" not in done.stderr + done.stdout
