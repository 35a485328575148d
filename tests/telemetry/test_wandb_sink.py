"""The mirror to wandb: complete, in the layout, offline, each once, and never what fails a run."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import job
from tests.wandb_files import config_of, mirrors, read_offline_file, series_of, summary_of
from uvm_kv.job.build import is_done, run_job
from uvm_kv.store.directories import read_json, read_table
from uvm_kv.store.records import Record, pack, read_records
from uvm_kv.sweep.progress import Event, tracked
from uvm_kv.tracking import wandb_sink
from uvm_kv.tracking.track import mirror_all
from uvm_kv.tracking.wandb_sink import FACETS, MAX_POINTS, METRICS, address_of, content_of, is_sent, send, step_series

SMALL = ("batch_size=4", "workload.prompt_tokens=64", "workload.output_tokens=256")
SHORT = ("batch_size=2", "max_steps=3")
TRACKING = {"project": "uvm-kv", "mode": "offline"}


def record_of(tmp_path: Path, *overrides: str) -> Record:
    one = job(tmp_path, *overrides)
    run_job(one, argv=["test"])
    ((record,), left_out) = read_records(one.directory)
    assert not left_out
    return record


def test_the_offline_file_holds_the_whole_layout(tmp_path: Path) -> None:
    one = job(tmp_path, *SMALL, "mechanism=pinned_balanced", "tracking=wandb")
    run_job(one, argv=[])
    mirror_all(tracked([Event("done", "x", str(one.directory), tracking=TRACKING)]))
    file = mirrors(one.directory.parent)[one.directory.name]
    records = read_offline_file(file)
    (run,) = records["run"]
    assert (run.run_id, run.run_group, run.project, run.job_type) == (one.directory.name, "test", "uvm-kv", "simulated")
    assert run.display_name == "pinned_balanced, batch 4, llama_7b, simulated"
    assert set(run.tags) == {"mechanism:pinned_balanced", "model:llama_7b", "hardware:rtx3090", "memory:pinned"}
    summary = read_json(one.directory / "summary.json")
    config = config_of(records)
    assert config["experiment"] == "test"
    assert config["offered_batch"] == 4
    assert config["model_name"] == config["model"]["name"] == "llama_7b"
    assert config["memory"]["kind"] == "pinned"
    assert config["provenance"]["git_sha"] == read_json(one.directory / "manifest.json")["git_sha"]
    assert "machine" not in config["provenance"]

    rows = series_of(records)
    steps = [row for row in rows if "steps/time_s" in row]
    assert len(steps) == MAX_POINTS
    assert {"steps/num_running", "steps/kv_used_bytes", "steps/stall_s", "steps/output_tokens_per_s"} <= set(steps[0])
    assert any("figure" in name for name in rows[-1])
    (glob,) = (metric for metric in records["metric"] if metric.glob_name)
    assert (glob.glob_name, glob.step_metric, glob.summary.none) == ("steps/*", "steps/time_s", True)

    told = summary_of(records)
    assert told["output_tokens_per_s"] == summary["output_tokens_per_s"]
    assert told["tpot_s_p99"] == summary["tpot_s"]["p99"]
    assert told["link_bytes_by_cause_h2d_copy_bytes"] == summary["link_bytes_by_cause"]["h2d_copy_bytes"]
    (artifact,) = records["artifact"]
    assert (artifact.name, artifact.type) == (f"run-{one.directory.name}", "run-directory")
    paths = {entry.path: entry.local_path for entry in artifact.manifest.contents}
    assert {"summary.json", "config.yaml", "manifest.json", "steps.parquet", "requests.parquet"} <= set(paths)
    assert all(Path(path).parent == one.directory for path in paths.values()), "finished files are not copied"
    assert not list(file.parent.rglob("wandb-metadata.json")), "the machine that sends is not the one that ran"


def test_what_is_mirrored_is_not_mirrored_again(tmp_path: Path) -> None:
    one = job(tmp_path, *SHORT, "tracking=wandb")
    run_job(one, argv=[])
    event = Event("done", "x", str(one.directory), tracking=TRACKING)
    mirror_all(tracked([event]))
    before = {file: file.stat().st_mtime_ns for file in one.directory.parent.rglob("*.wandb")}
    mirror_all(tracked([dataclasses.replace(event, status="skipped")]))
    assert {file: file.stat().st_mtime_ns for file in one.directory.parent.rglob("*.wandb")} == before


def test_a_tracker_that_fails_leaves_the_run_finished_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = job(tmp_path, *SHORT, "tracking=wandb")
    run_job(one, argv=[])
    monkeypatch.setitem(sys.modules, "wandb", None)
    mirror_all(tracked([Event("done", "x", str(one.directory), tracking=TRACKING)]))
    assert is_done(one)
    assert "tracking=wandb failed" in capsys.readouterr().err


def test_runs_that_did_not_ask_are_not_mirrored(tmp_path: Path) -> None:
    one = job(tmp_path, *SHORT)
    run_job(one, argv=[])
    mirror_all(tracked([Event("done", "x", str(one.directory)), Event("failed", "y", tracking=TRACKING)]))
    assert not list(tmp_path.rglob("*.wandb"))


def test_a_changed_run_is_not_mirrored_at_the_end_of_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of(tmp_path, *SHORT)
    summary = record.place / "summary.json"
    summary.write_text(summary.read_text().replace('"num_steps": 3', '"num_steps": 4'))
    mirror_all(tracked([Event("done", "x", str(record.place), tracking=TRACKING)]))
    assert "tampered" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.wandb"))


def test_a_mirror_that_fails_half_way_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = record_of(tmp_path, *SHORT)
    address, content = address_of(record, "uvm-kv"), content_of(record, read_table(record.place, "steps"), None)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(wandb_sink, "_media", killed)
    with pytest.raises(KeyboardInterrupt):
        send(address, dataclasses.replace(content, pictures={"figure": tmp_path / "x.png"}), "offline")
    assert not is_sent(address, "offline")
    assert not mirrors(address.home)
    # What a process leaves that had no time to clean up, and a mirror by a version that did not say what it holds.
    (address.home / "wandb" / f".writing-{record.id}" / "wandb" / f"offline-run-1-{record.id}").mkdir(parents=True)
    old = address.home / "wandb" / f"offline-run-20250101_000000-{record.id}"
    old.mkdir()
    (old / f"run-{record.id}.wandb").write_bytes(b"half")
    assert send(address, content, "offline") is None
    assert is_sent(address, "offline")
    assert list(mirrors(address.home)) == [record.id]
    (kept,) = (address.home / "wandb" / "replaced").iterdir()
    assert (kept / f"run-{record.id}.wandb").read_bytes() == b"half"


def test_a_run_that_was_run_again_is_mirrored_again_and_another_project_is_another_mirror(tmp_path: Path) -> None:
    record = record_of(tmp_path, *SHORT)
    for sha256, project, num_mirrors in (("a", "one", 1), ("b", "one", 1), ("b", "two", 2), ("b", "one", 2)):
        address = dataclasses.replace(address_of(record, project), sha256=sha256)
        assert send(address, content_of(record, None, None), "offline") is None
        assert is_sent(address, "offline")
        assert len(list((address.home / "wandb").glob("offline-run-*"))) == num_mirrors
    assert len(list((record.place.parent / "wandb" / "replaced").iterdir())) == 1


def test_a_run_of_a_packed_set_has_the_same_config_and_summary(tmp_path: Path) -> None:
    record = record_of(tmp_path / "runs", *SHORT)
    pack([record], {}, tmp_path / "packed" / "test")
    ((packed,), _) = read_records(tmp_path / "packed")
    own, other = (content_of(it, None, None) for it in (record, packed))
    private = own.config["provenance"].pop("argv"), other.config["provenance"].pop("argv")
    assert all(word in private[0] for word in private[1])
    assert dataclasses.replace(own, artifact=None) == other
    assert other.group == "test"


def test_metrics_are_in_every_summary_under_names_that_wandb_can_filter_by(tmp_path: Path) -> None:
    record = record_of(tmp_path, *SMALL, "mechanism=managed_by_tier")
    content = content_of(record, None, None)
    assert {metric.name for metric in METRICS} <= set(content.summary)
    assert all(metric.goal in ("maximize", "minimize", None) and metric.unit for metric in METRICS)
    for name in (*content.summary, *content.config):
        assert re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", name), name
    assert not set(content.summary) & set(FACETS)
    unobserved = {name for name, value in record.summary.items() if value is None and name not in FACETS}
    assert unobserved
    assert not unobserved & set(content.summary), "what was not observed is absent"


@pytest.mark.parametrize(
    ("more", "kind", "tags"),
    [
        ({}, "measured", ["mechanism:pinned_swap", "model:m", "hardware:h", "memory:pinned"]),
        ({"engine": "hf_generate"}, "peer", ["engine:hf_generate", "model:m", "hardware:h", "memory:pinned"]),
        ({"memory_emulated": True}, "measured", [*("mechanism:pinned_swap", "model:m", "hardware:h"),
                                                 *("memory:pinned", "memory:emulated")]),
        ({"origin": "replayed", "model": "m" * 90}, "replayed",
         ["mechanism:pinned_swap", "model:" + "m" * 58, "hardware:h", "memory:pinned"]),
    ],
)  # fmt: skip
def test_job_types_keep_origins_and_peers_apart(more: dict[str, Any], kind: str, tags: list[str]) -> None:
    summary = {"origin": "measured", "engine": "uvm_kv", "mechanism": "pinned_swap", "model": "m", "hardware": "h"}
    summary |= {"memory": "pinned", **more}
    assert wandb_sink.job_type(summary) == kind
    assert wandb_sink.tags(summary) == tags


def test_step_series_averages_long_runs(tmp_path: Path) -> None:
    record = record_of(tmp_path, *SMALL)
    steps = read_table(record.place, "steps")
    rows = step_series(steps)
    assert len(rows) == MAX_POINTS < len(steps["step"])
    assert rows[-1]["steps/step"] == len(steps["step"]) - 1
    times = [row["steps/time_s"] for row in rows]
    assert times == sorted(times)
    assert all(0 < row["steps/num_running"] <= 4 for row in rows)
    # Equal spans but for one step: their tokens over their time are those of the run.
    tokens = sum(row["steps/output_tokens_per_s"] * row["steps/duration_s"] for row in rows) / len(rows)
    assert tokens == pytest.approx(record.summary["num_output_tokens"] / len(steps["step"]), rel=0.01)


def test_step_series_leaves_out_what_was_not_observed() -> None:
    steps: dict[str, list[Any]] = {"step": [0, 1], "start_ns": [0, 10], "end_ns": [10, 30], "num_output_tokens": [1, 1]}
    rows = step_series({**steps, "stall_ns": [None, 5], "h2d_copy_bytes": [7, 9]})
    assert [row["steps/h2d_copy_bytes"] for row in rows] == [7, 9]
    assert all("steps/stall_s" not in row for row in rows)
    assert step_series({name: [] for name in steps}) == []


def test_the_page_says_unit_and_goal_of_every_metric() -> None:
    page = (Path(__file__).parents[2] / "docs" / "dashboards.md").read_text()
    for metric in METRICS:
        assert f"| `{metric.name}` | {metric.unit} | {metric.goal or ''} | {metric.what} |" in page
    assert all(f"`{facet}_name`" in page or f"`{facet}`" in page for facet in FACETS)
