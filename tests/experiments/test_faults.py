"""Sweeps that are killed, and folders that cannot be written: nothing finished is lost, nothing half is taken."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY
from uvm_kv.store.directories import read_json, read_table
from uvm_kv.store.whole import completed_runs

NUM_KILLS = 30
NUM_JOBS = 12
SWEEP = [
    *(sys.executable, "-m", "experiments.run", "-m"),
    f"batch_size={','.join(str(b) for b in range(1, NUM_JOBS + 1))}",
    "workload.output_tokens=128",
]


def kill(process: subprocess.Popen[bytes]) -> None:
    """The whole process group, workers included, as a power cut would."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {r.name: (r.stat().st_ino, (r / "summary.json").stat().st_mtime_ns) for r in completed_runs(folder)}


def test_thirty_kills_at_random_points_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """Each start is killed after a random time; whatever was finished stays untouched, and all of it is whole."""
    rng = random.Random(0)
    finished: dict[str, tuple[int, int]] = {}
    for _ in range(NUM_KILLS):
        process = subprocess.Popen(
            [*SWEEP, f"results_dir={tmp_path}"],
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        # Past the start-up, where the jobs are written.
        time.sleep(rng.uniform(1.0, 3.0))
        if process.poll() is None:
            kill(process)
        now = stamps(tmp_path)
        assert {name: now.get(name) for name in finished} == finished, "a finished run was lost or run again"
        finished = now
        for directory in completed_runs(tmp_path):
            summary = read_json(directory / "summary.json")
            assert len(read_table(directory, "steps")["step"]) == summary["num_steps"]
            assert len(read_table(directory, "requests")["request_id"]) == summary["num_requests"]
        if len(finished) == NUM_JOBS:
            shutil.rmtree(tmp_path / "adhoc")  # Begin anew, with the kills that are left.
            finished = {}
    last = subprocess.run([*SWEEP, f"results_dir={tmp_path}"], cwd=REPOSITORY, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    after = stamps(tmp_path)
    assert len(after) == NUM_JOBS
    assert {name: after[name] for name in finished} == finished
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_read_only_folder_is_named_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "fixed"
    folder.mkdir()
    mounted = False
    if os.geteuid() == 0:  # Root writes through permissions; a read-only mount stops root too.
        mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
        mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
        if not mounted:
            pytest.skip("root, and this machine may not mount a read-only tmpfs")
    else:
        folder.chmod(0o500)
    try:
        command = [sys.executable, "-m", "experiments.run", f"results_dir={folder}"]
        failed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert failed.returncode == 2
        assert f"results_dir={folder} cannot be written" in failed.stderr
        assert len(failed.stderr.splitlines()) == 1
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
