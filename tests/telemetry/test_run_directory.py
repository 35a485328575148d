"""Run directories: whole or absent, byte-identical for equal runs, named by what determines them."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest

from tests.jobs import job, resolved, run
from uvm_kv.job.build import is_done, jobs_of, run_job, workload_of
from uvm_kv.store import directories as store
from uvm_kv.store import whole
from uvm_kv.telemetry.recorder import REQUEST_COLUMNS, STEP_COLUMNS

SMALL = ("batch_size=4", "workload.prompt_tokens=64", "workload.output_tokens=32")
SUMMARY_FIELDS = """
schema_version origin runner hardware model mechanism memory placement scheduler workload layout block_size
offered_batch running_batch_mean running_batch_max num_requests num_output_tokens duration_s output_tokens_per_s
output_tokens_per_s_whole_run ttft_s tpot_s device_kv_bytes host_kv_bytes h2d_bytes d2h_bytes gpu_fault_groups
evicted_chunks preemptions stall_s energy_j energy_j_per_output_token idle_power_w
closed_form_ceiling
"""


def read_all(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("mechanism", ["device_recompute", "pinned_swap", "managed_demand", "pinned_balanced"])
def test_equal_runs_are_byte_identical(tmp_path: Path, mechanism: str) -> None:
    """Two folders get the same bytes, on a workload with random lengths and enough clients to preempt or page."""
    overrides = (f"mechanism={mechanism}", "batch_size=24", "workload=azure_conv", "workload.num_requests=48")
    files = ("summary.json", "steps.parquet", "requests.parquet")
    first, second = (job(tmp_path / name, *overrides) for name in "ab")
    for one in (first, second):
        run_job(one, argv=["test"])
    assert first.directory.name == second.directory.name
    assert read_all(first.directory, files) == read_all(second.directory, files)


def test_the_seed_changes_the_run_and_its_id(tmp_path: Path) -> None:
    shared = ("workload=azure_conv", "batch_size=4")
    first, second = (job(tmp_path, *shared, f"seed={s}") for s in (0, 1))
    assert first.directory != second.directory
    assert run_job(first, argv=[])["duration_s"] != run_job(second, argv=[])["duration_s"]


@pytest.mark.parametrize("override", ["tracking=wandb", "rerun=true", "num_repeats=3", "results_dir=elsewhere"])
def test_the_run_id_leaves_out_what_does_not_determine_the_result(tmp_path: Path, override: str) -> None:
    overrides = [f"results_dir={tmp_path}"]
    ids = {store.run_id(resolved(*overrides, *extra).determining(), 0) for extra in ((), (override,))}
    assert len(ids) == 1


def test_a_trace_counts_by_its_content_not_its_path(tmp_path: Path) -> None:
    text = "arrival_s,prompt_tokens,output_tokens\n0,100,10\n1,50,10\n"
    paths = [tmp_path / name for name in ("a.csv", "b.csv")]
    for path in paths:
        path.write_text(text)
    names = {job(tmp_path, "workload=trace", f"workload.path={p}").directory.name for p in paths}
    assert len(names) == 1
    paths[0].write_text(text + "2,50,10\n")
    assert job(tmp_path, "workload=trace", f"workload.path={paths[0]}").directory.name not in names


def test_summary_has_every_field_and_no_path_or_wall_clock(tmp_path: Path) -> None:
    one = job(tmp_path, "mechanism=pinned_balanced", *SMALL)
    summary = run_job(one, argv=["a", "command"])
    assert set(SUMMARY_FIELDS.split()) <= set(summary)
    assert {*summary["ttft_s"]} == {*summary["tpot_s"]} == {"mean", "p50", "p90", "p99"}
    assert summary["origin"] == "simulated"
    assert json.loads((one.directory / "summary.json").read_text()).keys() == summary.keys()
    assert str(tmp_path) not in (one.directory / "summary.json").read_text()
    manifest = store.read_json(one.directory / "manifest.json")
    assert manifest["argv"] == ["a", "command"]
    assert {"git_sha", "git_dirty", "versions", "machine", "gpu", "seed", "started", "duration_s"} <= set(manifest)
    assert (one.directory / "config.yaml").read_text().count("batch_size: 4") == 1


def test_tables_have_their_columns_and_agree_with_the_summary(tmp_path: Path) -> None:
    one = job(tmp_path, *SMALL)
    summary = run_job(one, argv=[])
    steps, requests = (store.read_table(one.directory, name) for name in ("steps", "requests"))
    assert tuple(steps) == STEP_COLUMNS
    assert tuple(requests) == REQUEST_COLUMNS
    assert len(steps["step"]) == summary["num_steps"]
    assert sum(t or 0 for t in steps["num_output_tokens"]) == summary["num_output_tokens"]
    assert sum(t or 0 for t in requests["output_tokens"]) == summary["num_output_tokens"]
    assert steps["start_ns"][1:] == steps["end_ns"][:-1]


def test_without_pyarrow_the_tables_are_json_lines_of_the_same_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_arrow, without = (job(tmp_path / name, *SMALL) for name in "ab")
    run_job(with_arrow, argv=[])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    run_job(without, argv=[])
    assert (without.directory / "steps.jsonl.gz").is_file()
    packed = store.read_table(without.directory, "steps")
    with pytest.raises(ValueError, match="needs pyarrow"):
        store.read_table(with_arrow.directory, "steps")
    monkeypatch.undo()
    assert packed == store.read_table(with_arrow.directory, "steps")
    assert store.read_table(without.directory, "requests") == store.read_table(with_arrow.directory, "requests")


def test_a_full_disk_leaves_nothing_that_looks_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = job(tmp_path, *SMALL)

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "_write_table", no_space)
    with pytest.raises(OSError, match="No space left"):
        run_job(one, argv=[])
    assert not is_done(one)
    assert list((tmp_path / "test").iterdir()) == []


def test_what_a_killed_process_left_is_not_a_run_and_is_cleared(tmp_path: Path) -> None:
    one = job(tmp_path, *SMALL)
    dead = one.directory.parent / f"{whole.TEMPORARY}{one.directory.name}-999999999@{store.machine()}"
    dead.mkdir(parents=True)
    (dead / "summary.json").write_text("{}")
    assert not is_done(one)
    assert whole.completed_runs(tmp_path) == []
    run_job(one, argv=[])
    assert whole.completed_runs(tmp_path) == [one.directory]
    assert not dead.exists()


def test_rerun_replaces_and_a_slower_twin_does_not(tmp_path: Path) -> None:
    one, again = job(tmp_path, *SMALL), job(tmp_path, *SMALL, "rerun=true")
    run_job(one, argv=["first"])
    assert is_done(one)
    assert not is_done(again)
    run_job(one, argv=["twin"])
    assert store.read_json(one.directory / "manifest.json")["argv"] == ["first"]
    run_job(again, argv=["rerun"])
    assert store.read_json(one.directory / "manifest.json")["argv"] == ["rerun"]


def test_repeats_have_directories_and_draws_of_their_own(tmp_path: Path) -> None:
    """Nine runs of three seeds and three repeats are nine draws."""
    given = ("workload=azure_conv", "workload.num_requests=20", "num_repeats=3", f"results_dir={tmp_path}")
    jobs = [one for seed in range(3) for one in jobs_of(resolved(*given, f"seed={seed}"), "test")]
    assert len({one.directory for one in jobs}) == 9
    assert len({tuple(workload_of(one).lengths) for one in jobs}) == 9
    assert len({one.sampling_seed for one in jobs}) == 9


def test_a_repeat_can_be_asked_for_alone(tmp_path: Path) -> None:
    given = ("workload=azure_conv", f"results_dir={tmp_path}")
    third = jobs_of(resolved(*given, "num_repeats=3"), "test")[2]
    (alone,) = jobs_of(resolved(*given, "first_repeat=2"), "test")
    assert alone.directory == third.directory
    assert workload_of(alone) == workload_of(third)


def test_max_steps_is_said_and_steady_throughput_is_null(tmp_path: Path) -> None:
    summary = run(tmp_path, "max_steps=10")
    assert summary["num_steps"] == 10
    assert any("max_steps" in text for text in summary["warnings"])
    short = run(tmp_path, "batch_size=4", "workload.num_requests=4", "workload.arrival=all_at_once")
    assert short["output_tokens_per_s"] is None
    assert short["output_tokens_per_s_whole_run"] > 0
    assert any("no steady window" in text for text in short["warnings"])


def test_files_that_belong_together_are_replaced_together_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    with store.written_whole(folder) as staging:
        for name in ("figure.png", "points.csv"):
            (staging / name).write_text("old")
    (folder / "notes.txt").write_text("the user's")

    def fail() -> None:
        with store.written_whole(folder) as staging:
            (staging / "figure.png").write_text("new")
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        "figure.png": "old", "points.csv": "old", "notes.txt": "the user's"
    }  # fmt: skip
    with store.written_whole(folder) as staging:
        (staging / "figure.png").write_text("new")
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        "figure.png": "new", "points.csv": "old", "notes.txt": "the user's"
    }  # fmt: skip
