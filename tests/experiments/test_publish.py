"""Finished runs sent after the fact: each once, the broken ones listed and left out, to files and to a server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.jobs import job
from tests.wandb_files import config_of, mirrors, read_offline_file, series_of, summary_of
from tests.wandb_server import KEY, wandb_server
from uvm_kv.job.build import run_job
from uvm_kv.store.failures import write_failure
from uvm_kv.store.records import pack, read_records
from uvm_kv.tracking.publish import main

REPOSITORY = Path(__file__).parents[2]
NO_FIGURES = ("--figures", "none")


def finished(folder: Path, *batches: int, mechanism: str = "device_resident") -> list[str]:
    """Ids of short runs in `folder`/test."""
    ids = []
    for batch in batches:
        one = job(folder, f"batch_size={batch}", "max_steps=3", f"mechanism={mechanism}")
        run_job(one, argv=["test"])
        ids.append(one.directory.name)
    return ids


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """An environment without the login and settings of the person who runs the tests."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return {**kept, "NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path / "wandb-config"), **more}


def command(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    code = [sys.executable, "-m", "experiments.publish", *NO_FIGURES, *arguments]
    return subprocess.run(code, cwd=REPOSITORY, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_each_run_is_sent_once_and_what_is_broken_is_listed_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = finished(tmp_path, 2, 3)
    (tampered, old, half) = finished(tmp_path, 4, 5, 6)
    home = tmp_path / "test"
    for name, change in ((tampered, ('"num_steps": 3', '"num_steps": 9')), (old, ('"schema_version": ', '"x": '))):
        summary = home / name / "summary.json"
        summary.write_text(summary.read_text().replace(*change))
    (home / half / "summary.json").unlink()
    (home / "foreign").mkdir()
    (home / "foreign" / "summary.json").write_text("{}")

    assert main([str(tmp_path), *NO_FIGURES]) == 0
    out, err = capsys.readouterr()
    assert "3 written as offline mirrors, 0 were there" in out
    assert all(
        f"{name}: {why}" in err for name, why in ((tampered, "tampered"), (old, "foreign"), (half, "half-written"))
    )
    assert "foreign: foreign" in err
    sent = mirrors(home)
    (report,) = set(sent) - set(good)
    assert set(good) < set(sent)
    assert report.startswith("test-")

    records = read_offline_file(sent[report])
    (run,) = records["run"]
    assert (run.job_type, run.run_group, run.display_name) == ("report", "test", "test, 2 runs")
    assert summary_of(records)["num_runs"] == summary_of(records)["num_simulated"] == 2
    assert summary_of(records)["num_left_out"] == 4
    assert config_of(records)["metrics"]["tpot_s_p99"] == {
        "unit": "s",
        "goal": "minimize",
        "what": "time per output token, 99th percentile; also _mean, _p50, _p90",
    }
    logged = {name.split("/")[0] for row in series_of(records) for name in row}
    assert {"report", "report_figure"} <= logged
    (artifact,) = records["artifact"]
    assert (artifact.name, artifact.type) == ("results-test", "results-set")
    assert {"runs.jsonl.gz", "report.html", "points.csv"} <= {entry.path for entry in artifact.manifest.contents}

    assert main([str(tmp_path), *NO_FIGURES]) == 0
    assert "0 written as offline mirrors, 3 were there; nothing to do" in capsys.readouterr().out
    assert mirrors(home) == sent
    (new,) = finished(tmp_path, 7)
    assert main([str(home), *NO_FIGURES]) == 0
    assert "2 written as offline mirrors, 2 were there" in capsys.readouterr().out
    assert set(mirrors(home)) > {*sent, new}


def test_a_packed_set_is_sent_as_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = finished(tmp_path / "runs", 2, 3)
    pack(read_records(tmp_path / "runs")[0], {}, tmp_path / "reference" / "test")
    assert main([str(tmp_path / "reference"), *NO_FIGURES]) == 0
    sent = mirrors(tmp_path / "reference" / "test")
    assert set(ids) < set(sent)
    records = read_offline_file(sent[ids[0]])
    assert summary_of(records)["num_steps"] == 3
    assert not records["artifact"]
    assert "3 written" in capsys.readouterr().out


def test_a_report_is_sent_again_where_a_point_is_refused_since(tmp_path: Path) -> None:
    finished(tmp_path, 2)
    assert main([str(tmp_path), *NO_FIGURES]) == 0
    before = set(mirrors(tmp_path / "test"))
    identity = {"model": "llama_7b", "mechanism": "device_resident", "offered_batch": 9}
    directory = tmp_path / "test" / ("0" * 12 + "-r0")
    write_failure(directory, identity=identity, error="no room", tried=False, argv=[], git_sha=None, refused=True)
    assert main([str(tmp_path), *NO_FIGURES]) == 0
    (new,) = set(mirrors(tmp_path / "test")) - before
    records = read_offline_file(mirrors(tmp_path / "test")[new])
    assert summary_of(records)["num_failed"] == 1
    (artifact,) = records["artifact"]
    assert "failed.jsonl.gz" in {entry.path for entry in artifact.manifest.contents}


def test_a_figure_goes_with_the_runs_that_it_is_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path / "runs", 2)
    ((record,), _) = read_records(tmp_path / "runs")
    figures = tmp_path / "figures"
    figures.mkdir()
    for name, sha256 in (("mine", record.sha256), ("stale", "0" * 64)):
        (figures / f"{name}.json").write_text(json.dumps({"experiments": ["test"], "runs": {record.id: sha256}}))
        (figures / f"{name}.csv").write_text("a\n1\n")
    (figures / "other.json").write_text("[]")
    assert main([str(tmp_path / "runs"), "--figures", str(figures)]) == 0
    sent = mirrors(tmp_path / "runs" / "test")
    ((artifact,),) = (read_offline_file(file)["artifact"] for name, file in sent.items() if name != record.id)
    paths = {entry.path for entry in artifact.manifest.contents}
    assert {"mine.json", "mine.csv"} <= paths
    assert not {"stale.json", "stale.csv", "other.json"} & paths


def test_killed_in_the_middle_it_goes_on(tmp_path: Path) -> None:
    ids = finished(tmp_path, *range(2, 6))
    env, home = environment(tmp_path), tmp_path / "test"
    code = [sys.executable, "-m", "experiments.publish", *NO_FIGURES, str(tmp_path)]
    process = subprocess.Popen(code, cwd=REPOSITORY, env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(mirrors(home)) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = mirrors(home)
    done = command(str(tmp_path), env=env)
    assert done.returncode == 0, done.stderr
    assert f"{len(ids) + 1 - len(before)} written as offline mirrors, {len(before)} were there" in done.stdout
    after = mirrors(home)
    assert before.items() <= after.items()
    assert len(after) == len(ids) + 1
    assert all(len(read_offline_file(file)["exit"]) == 1 for file in after.values()), "every mirror is whole"
    assert not list((home / "wandb").glob(".writing-*"))


def test_what_a_killed_process_left_is_removed_though_its_mirror_is_whole(tmp_path: Path) -> None:
    finished(tmp_path, 2)
    assert main([str(tmp_path), *NO_FIGURES]) == 0
    left = tmp_path / "test" / "wandb" / ".writing-left" / "wandb"
    left.mkdir(parents=True)
    finished(tmp_path, 3)
    assert main([str(tmp_path), *NO_FIGURES]) == 0
    assert not left.parent.exists()


def test_online_a_server_gets_everything_once_and_a_refusal_costs_only_its_run(tmp_path: Path) -> None:
    first, second = finished(tmp_path, 2, 3, mechanism="pinned_balanced")
    with wandb_server() as server:
        env = environment(tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
        # The mirror of an offline sweep is what is sent; it is not written twice.
        assert command(str(tmp_path), env=env).returncode == 0
        written = mirrors(tmp_path / "test")
        server.refuse = {first}
        done = command(str(tmp_path), "--mode", "online", env=env)
        assert done.returncode == 1
        assert f"error: tracking=wandb failed for {first}" in done.stderr
        assert "2 sent, 0 were there" in done.stdout
        assert first not in server.runs
        assert len(server.finished) == 2
        server.refuse = set()
        done = command(str(tmp_path), "--mode", "online", env=env)
        assert (done.returncode, done.stdout) == (0, "1 sent, 2 were there\n"), done.stderr
        assert len(server.finished) == len(set(server.finished)) == 3
        assert mirrors(tmp_path / "test") == written
        one = server.runs[first]
        assert (one["groupName"], one["jobType"], one["project"]) == ("test", "simulated", "uvm-kv")
        assert set(one["tags"]) >= {"mechanism:pinned_balanced", "model:llama_7b"}
        assert len(server.history[first]) == 4  # Three steps, and the figure.
        assert any(name.startswith("media/images/figure") for name in server.files[first])
        kinds = sorted(
            (artifact["artifactTypeName"], artifact["artifactCollectionName"]) for artifact in server.artifacts
        )
        assert kinds == sorted(
            [("results-set", "results-test"), ("run-directory", f"run-{first}"), ("run-directory", f"run-{second}")]
        )
        done = command(str(tmp_path), "--mode", "online", env=env)
        assert (done.returncode, done.stdout) == (0, "0 sent, 3 were there; nothing to do\n")
        assert len(server.finished) == 3


def test_online_without_a_server_mirrors_are_written_and_wait(tmp_path: Path) -> None:
    ids = finished(tmp_path, 2)
    env = environment(tmp_path, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=KEY)
    done = command(str(tmp_path), "--mode", "online", env=env)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "nothing is sent now" in line
    assert "cannot be reached" in line
    assert set(ids) < set(mirrors(tmp_path / "test"))


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main([str(tmp_path)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), "--mode", "sideways"])
    assert stop.value.code == 2


def test_without_wandb_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tmp_path, 2)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([str(tmp_path), *NO_FIGURES]) == 2
    assert "pip install wandb" in capsys.readouterr().err
