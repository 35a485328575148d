"""Child processes that end with this process, whatever ends it and whatever they are doing.

A worker that is still importing cannot ask the system to end it with its parent, and a process that is killed cannot
end its workers. A small watcher process does it: it waits for the end of this process, then kills every process that
carries its mark. The mark is an environment variable, so each child has it from its first instruction and passes it on
to its own children. Without /proc, which only Linux has, children are left to end by themselves.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from pathlib import Path

PREFIX = "UVM_KV_FAMILY_"
MARK = re.compile(PREFIX + r"\d+_\d+")
PROC = Path("/proc")
TRACKER = b"resource_tracker"
"""In the command of Python's process that unlinks the semaphores of dead processes, and ends when it has done so."""
TRACKER_S = 5.0
"""How long it may take for that."""
FORKING_S = 0.3
"""A process that was being started when its parent was killed shows its mark within this time."""
LOOK_S = 0.02

_marks: dict[int, str] = {}
"""The mark of this process, by its pid: a forked child begins a family of its own."""


def end_children_with_me() -> None:
    """Start the watcher. Call this before the first child process is started; later calls do nothing."""
    if os.getpid() in _marks or not (PROC / "self" / "environ").is_file():
        return
    mark = f"{PREFIX}{os.getpid()}_{time.monotonic_ns()}"
    reads, _ = os.pipe()  # Nobody inherits the end to write, which the system closes when this process ends.
    try:
        os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", "-B", __file__, mark],
            {"PATH": os.environ.get("PATH", "")},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, reads, 0),
                # Who reads our output waits until all who can write it have ended.
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
            setsid=True,  # Ctrl-C is not for it.
        )
    finally:
        os.close(reads)
    _marks[os.getpid()] = mark
    os.environ[mark] = "1"


def _members(mark: str) -> dict[int, bool]:
    """Processes with the environment variable `mark` by pid, and whether each is a resource tracker."""
    found = {}
    for folder in PROC.iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                names = {entry.partition(b"=")[0] for entry in (folder / "environ").read_bytes().split(b"\0")}
                if mark.encode() in names:
                    found[int(folder.name)] = TRACKER in (folder / "cmdline").read_bytes()
            except OSError:  # It ended, or is another user's.
                continue
    return found


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _end_family(mark: str) -> None:
    assert MARK.fullmatch(mark), mark  # Whatever has this variable is killed.
    start = time.monotonic()
    while True:
        members = _members(mark)
        waited = time.monotonic() - start
        _kill([pid for pid, is_tracker in members.items() if not is_tracker or waited > TRACKER_S])
        if not members and waited > FORKING_S:
            return
        time.sleep(LOOK_S)


def _watch(mark: str) -> None:
    """Wait until the other end of the pipe on standard input is closed, which the end of its process does."""
    os.chdir("/")
    for entry in [*(PROC / "self" / "fd").iterdir()]:  # What its parent had open for its own children.
        if int(entry.name) > 2:
            with contextlib.suppress(OSError):
                os.close(int(entry.name))
    while os.read(0, 1):
        pass
    _end_family(mark)


if __name__ == "__main__":
    _watch(sys.argv[1])
