"""Sweeps through Hydra's launchers for real: processes of this machine, submitit's local mode, a Ray cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY
from uvm_kv.commands.run import preflight
from uvm_kv.config.names import parse_overrides
from uvm_kv.store import directories as store
from uvm_kv.store.directories import read_json
from uvm_kv.store.records import read_failures
from uvm_kv.store.whole import completed_runs
from uvm_kv.sweep import launchers
from uvm_kv.sweep.progress import ENVIRONMENT, Event, SweepLog, read_command, report_event, sweep_log

COMMAND = [sys.executable, "-m", "experiments.run", "-m"]
QUICK = ["max_steps=20", "workload.prompt_tokens=64"]
SWEEP = ["batch_size=1,2,3", *QUICK]
INSTALLED = [
    pytest.param(name, marks=pytest.mark.skipif(not all(map(launchers._is_there, modules)), reason="not installed"))
    for name in launchers.LAUNCHERS
    if name != "submitit_slurm"
    for _, modules in [launchers.NEEDS.get(name, ("", ()))]
]
KILLED_WHILE_IT_WRITES = """
import os, signal, sys

def watch(event, arguments):
    if event == "open" and str(arguments[0]).endswith("summary.json") and "/.tmp-{run}-" in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
"""


def sweep(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def summaries(folder: Path) -> dict[str, bytes]:
    return {run.name: (run / "summary.json").read_bytes() for run in completed_runs(folder)}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep by one process, a job after another."""
    folder = tmp_path_factory.mktemp("reference")
    done = sweep("hydra/launcher=basic", *SWEEP, f"results_dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("launcher", INSTALLED)
def test_a_killed_worker_costs_its_job_and_the_same_command_runs_it(
    tmp_path: Path, reference: Path, launcher: str
) -> None:
    """The launcher's workers write the same bytes as one process."""
    results, expected = tmp_path / "it's here", summaries(reference)
    victim = next(r for r in completed_runs(reference) if read_json(r / "summary.json")["offered_batch"] == 2).name
    (tmp_path / "sitecustomize.py").write_text(KILLED_WHILE_IT_WRITES.replace("{run}", victim))
    command = [f"hydra/launcher={launcher}", *SWEEP, f"results_dir='{results}'".replace("it's", r"it\'s")]

    broken = sweep(*command, PYTHONPATH=str(tmp_path))
    assert broken.returncode == 1
    assert "Traceback" not in broken.stderr + broken.stdout
    assert "2 of 3 runs are complete, 1 failed." in broken.stderr
    (said,) = [line for line in broken.stderr.splitlines() if line.startswith("error: ")]
    assert said.startswith("error: llama_7b fixed custom batch 2: ")
    assert "worker" in said
    assert summaries(results) == {name: b for name, b in expected.items() if name != victim}
    record = read_failures(results)[0][victim]
    assert (record["offered_batch"], record["tried"]) == (2, True)
    assert record["error"] in said

    again = sweep(*command)
    assert again.returncode == 0, again.stderr
    assert "3 of 3 runs are complete (2 were complete already), 0 failed." in again.stderr
    assert summaries(results) == expected
    assert read_failures(results)[0] == {}
    assert not [path for path in results.rglob(".tmp-*") if ".submitit" not in path.parts]


@pytest.mark.skipif(not launchers._is_there("submitit"), reason="submitit is not installed")
def test_sweeps_of_two_launchers_at_once_lose_nothing(tmp_path: Path) -> None:
    both = [
        subprocess.Popen(
            [*COMMAND, f"hydra/launcher={launcher}", f"batch_size={batches}", *QUICK, f"results_dir={tmp_path}"],
            cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for launcher, batches in (("joblib", "1,2,3,4"), ("submitit_local", "5,4,3,2"))
    ]  # fmt: skip
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert "4 of 4 runs are complete" in errors
    runs = completed_runs(tmp_path)
    assert sorted(read_json(run / "summary.json")["offered_batch"] for run in runs) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("launcher", [p for p in INSTALLED if p.values[0] != "joblib"])
def test_ctrl_c_ends_the_workers_and_keeps_what_is_finished(tmp_path: Path, launcher: str) -> None:
    long = ["batch_size=2,3,4,5,6,7", "workload.prompt_tokens=512", "workload.output_tokens=1024"]
    process = subprocess.Popen(
        [*COMMAND, f"hydra/launcher={launcher}", *long, f"results_dir={tmp_path}"],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not completed_runs(tmp_path) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "interrupted:" in output
    assert "Traceback" not in output
    left = len(completed_runs(tmp_path))
    assert 1 <= left < 6
    deadline = time.monotonic() + 60
    while (alive := of_session(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive == []


def of_session(session: int) -> list[str]:
    """Names of its processes that are no zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, _, _, its_session = rest.split()[:4]
        if int(its_session) == session and state != "Z":
            found.append(name)
    return found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hydra/launcher=slurm"], "hydra/launcher 'slurm' is unknown; did you mean submitit_slurm"),
        (["hydra.launcher.verbose=3"], "hydra.launcher.verbose would be ignored; of hydra/launcher=joblib"),
        (["runner=cuda", "hydra/launcher=ray"], "runner=cuda with hydra/launcher=ray: one process at a time"),
    ],
)
def test_a_launcher_that_cannot_do_it_is_refused(tmp_path: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        preflight([*arguments, "batch_size=1,2", f"results_dir={tmp_path}"])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("launcher", "extra"), [("submitit_slurm", "slurm"), ("submitit_local", "slurm"), ("ray", "ray")]
)
def test_a_launcher_that_is_not_installed_is_a_line_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, launcher: str, extra: str
) -> None:
    monkeypatch.setattr(launchers, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=rf"not installed here: pip install -e '\.\[{extra}\]'"):
        launchers.check(launcher, [])


@pytest.mark.skipif(not launchers._is_there("submitit"), reason="submitit is not installed")
def test_a_launcher_that_cannot_start_is_a_line(tmp_path: Path) -> None:
    """SLURM where there is none."""
    done = sweep("hydra/launcher=submitit_slurm", *SWEEP, f"results_dir={tmp_path}", PATH="/nowhere")
    assert done.returncode == 1
    assert "error: hydra/launcher=submitit_slurm cannot continue: " in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert completed_runs(tmp_path) == []


def test_a_search_takes_as_many_processes_as_its_sweep() -> None:
    assert launchers.num_workers(parse_overrides(["batch_size=1,2", "hydra.launcher.n_jobs=1"])) == 1
    assert launchers.num_workers(parse_overrides(["batch_size=1,2"])) == os.cpu_count()


def test_only_this_machine_s_abandoned_directories_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "0123456789ab-r0"
    dead = 999_999_999
    own, mine = store.temporary_path(run), run.with_name(f".tmp-{run.name}-{dead}@{store.machine()}")
    alive = run.with_name(f".tmp-{run.name}-{os.getppid()}@{store.machine()}")
    longer = run.with_name(f".tmp-{run.name}-{dead}@{store.machine()}0")
    replaced = run.with_name(f"{mine.name}-old")
    monkeypatch.setattr(store.platform, "node", lambda: "another")
    others = store.temporary_path(run).with_name(f".tmp-{run.name}-{dead}@{store.machine()}")
    monkeypatch.undo()
    for path in (own, mine, alive, longer, replaced, others):
        path.mkdir()
    store.remove_abandoned(run)
    assert {path for path in (own, mine, alive, longer, replaced, others) if path.exists()} == {alive, longer, others}


def test_a_worker_that_does_not_see_the_sweep_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match="results_dir is not on a file system that all machines share"):
        read_command()


def test_a_shared_sweep_folder_holds_the_command_and_is_gone_after(tmp_path: Path) -> None:
    with sweep_log(1, "", ["what", "was typed"], tmp_path) as log:
        assert log.folder.parent == tmp_path
        assert read_command().argv == ["what", "was typed"]
        assert read_command().folder == str(Path.cwd())
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_is_half_there_is_read_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    report_event(Event("started", "a", "runs/a", overrides=["batch_size=1"]))
    log = SweepLog(tmp_path)
    other = tmp_path / "1@elsewhere.jsonl"
    line = json.dumps({"status": "done", "label": "a", "directory": "runs/a"}) + "\n"
    other.write_text(line[:20])
    log.poll()
    assert (list(log.running), log.events) == (["runs/a"], [])
    other.write_text(line)
    log.poll()
    assert (list(log.running), [event.status for event in log.events]) == ([], ["done"])
