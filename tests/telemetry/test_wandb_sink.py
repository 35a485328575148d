"""The mirror to wandb: complete, offline, and never what fails a run."""

from __future__ import annotations

import struct
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from experiments.progress import Event
from experiments.track import mirror_all
from tests.jobs import job
from uvm_kv.config.build import is_done, run_job
from uvm_kv.telemetry.store import read_json, read_table
from uvm_kv.telemetry.wandb_sink import MAX_POINTS, is_mirrored, step_series

SMALL = ("batch_size=4", "workload.prompt_tokens=64", "workload.output_tokens=256")
TRACKING = {"project": "uvm-kv", "mode": "offline"}
BLOCK_BYTES = 32 * 1024


def read_offline_file(path: Path) -> dict[str, list[Any]]:
    """Records of a `.wandb` file by kind: a LevelDB log (blocks of 32 KiB, headers of 7 bytes) of protobufs."""
    from wandb.proto import wandb_internal_pb2

    data, position, record = path.read_bytes(), 7, b""
    found: dict[str, list[Any]] = defaultdict(list)
    while position < len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < 7:
            position += left
            continue
        _, length, part = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if part in (1, 4):  # whole, or the last of several parts
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            kind = message.WhichOneof("record_type")
            found[kind].append(getattr(message, kind))
            record = b""
    return found


def test_the_offline_file_holds_config_steps_summary_figure_and_directory(tmp_path: Path) -> None:
    one = job(tmp_path, *SMALL, "tracking=wandb")
    run_job(one, argv=[])
    assert not is_mirrored(one.directory)
    mirror_all([Event("done", "x", str(one.directory), tracking=TRACKING)])
    assert is_mirrored(one.directory)
    (file,) = one.directory.parent.rglob("*.wandb")
    records = read_offline_file(file)
    (run,) = records["run"]
    assert (run.run_id, run.run_group, run.project) == (one.directory.name, "test", "uvm-kv")
    config = {u.key: u.value_json for u in run.config.update}
    assert config["batch_size"] == "4"
    assert len(records["history"]) >= MAX_POINTS
    names = {item.key or "/".join(item.nested_key) for item in records["history"][0].item}
    assert {"num_running", "time_s", "kv_used_bytes"} <= names
    assert any("figure" in (item.key, *item.nested_key) for record in records["history"] for item in record.item)
    summary = {u.key: u.value_json for record in records["summary"] for u in record.update}
    assert float(summary["output_tokens_per_s"]) == read_json(one.directory / "summary.json")["output_tokens_per_s"]
    (artifact,) = records["artifact"]
    paths = {entry.path for entry in artifact.manifest.contents}
    assert {"summary.json", "config.yaml", "manifest.json", "steps.parquet", "requests.parquet"} <= paths
    before = file.stat().st_mtime_ns
    mirror_all([Event("skipped", "x", str(one.directory), tracking=TRACKING)])
    assert [f.stat().st_mtime_ns for f in one.directory.parent.rglob("*.wandb")] == [before]


def test_a_tracker_that_fails_leaves_the_run_finished_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = job(tmp_path, *SMALL, "tracking=wandb")
    run_job(one, argv=[])
    monkeypatch.setitem(sys.modules, "wandb", None)
    mirror_all([Event("done", "x", str(one.directory), tracking=TRACKING)])
    assert is_done(one)
    assert "tracking=wandb failed" in capsys.readouterr().err


def test_runs_that_did_not_ask_are_not_mirrored(tmp_path: Path) -> None:
    one = job(tmp_path, *SMALL)
    run_job(one, argv=[])
    mirror_all([Event("done", "x", str(one.directory)), Event("failed", "y", tracking=TRACKING)])
    assert not list(tmp_path.rglob("*.wandb"))


def test_step_series_averages_long_runs(tmp_path: Path) -> None:
    one = job(tmp_path, *SMALL)
    run_job(one, argv=[])
    steps = read_table(one.directory, "steps")
    rows = step_series(steps)
    assert len(rows) == MAX_POINTS < len(steps["step"])
    assert rows[-1]["step"] == len(steps["step"]) - 1
    times = [row["time_s"] for row in rows]
    assert times == sorted(times)
    assert all(0 < row["num_running"] <= 4 for row in rows)
