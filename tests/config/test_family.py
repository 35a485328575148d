"""Children end with their parent, however it ends; what they leave is cleared by the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY
from uvm_kv.store import family, scratch
from uvm_kv.store.directories import machine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
PATIENCE_S = 60.0
PARENT = """
import subprocess, sys, time
from uvm_kv.store.family import end_children_with_me
end_children_with_me(); end_children_with_me()
grandchild = "import time; time.sleep(600)"
child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}], start_new_session=True)"
children = [subprocess.Popen([sys.executable, "-c", child]) for _ in range(2)]
print("begun", flush=True)
{then}
"""


def carriers(word: bytes) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if word in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def wait_for(condition: object, word: bytes, number: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while len(carriers(word)) != number:
        assert time.monotonic() < deadline, (condition, carriers(word))
        time.sleep(0.05)


@pytest.mark.parametrize("end", ["kill", "term", "exit", "error"])
def test_children_and_grandchildren_end_with_the_process_that_began_them(tmp_path: Path, end: str) -> None:
    word = f"TEST_FAMILY={tmp_path}\0".encode()
    then = {"exit": "sys.exit(0)", "error": "raise ValueError"}.get(end, "time.sleep(600)")
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT.replace("{then}", then)], cwd=REPOSITORY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {"TEST_FAMILY": str(tmp_path)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    if end in ("kill", "term"):
        wait_for("begun", word, 5)
        process.send_signal(signal.SIGKILL if end == "kill" else signal.SIGTERM)
    process.wait(PATIENCE_S)
    wait_for(end, word, 0)
    process.stdout.close()


def test_only_a_mark_of_ours_is_ever_looked_for() -> None:
    for mark in ("", "X", "PATH", family.PREFIX, f"{family.PREFIX}1"):
        with pytest.raises(AssertionError):
            family._end_family(mark)


def test_scratch_folders_of_dead_processes_go_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "SEMAPHORES", tmp_path / "shm")
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead, alive = child.pid, os.getpid()
    (tmp_path / "shm").mkdir()
    gone = [tmp_path / f"uvm-kv-{dead}@{machine()}-abc", tmp_path / "shm" / f"sem.loky-{dead}-x"]
    kept = [
        tmp_path / f"uvm-kv-{alive}@{machine()}-abc",
        tmp_path / f"uvm-kv-{dead}@another-machine-abc",
        tmp_path / f"uvm-kv-{dead}",
        tmp_path / "shm" / f"sem.loky-{alive}-x",
    ]
    for path in (*gone, *kept):
        path.mkdir()
    gone[1].rmdir()
    gone[1].touch()
    with scratch.scratch_folder() as folder:
        assert folder.parent == tmp_path and folder.is_dir()
        assert not any(path.exists() for path in gone) and all(path.exists() for path in kept)
    assert not folder.exists()
