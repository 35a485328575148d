"""Folders for temporary files that say whose they are, so that what a killed process left is removed by the next.

<system's temporary folder>/uvm-kv-<pid>@<machine>-<random>/
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from uvm_kv.store.directories import is_alive, machine

PREFIX = "uvm-kv-"
SEMAPHORES = Path("/dev/shm")
"""Folder in which Linux keeps named semaphores as files."""


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder of this process's own, deleted at the end of the context."""
    clear_abandoned()
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}@{machine()}-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def clear_abandoned() -> None:
    """Remove the scratch folders of this user's dead processes on this machine, and the semaphores of their workers."""
    ours = re.compile(re.escape(PREFIX) + r"(\d+)@" + re.escape(machine()) + "-[^-]*")
    with contextlib.suppress(OSError):
        for folder in Path(tempfile.gettempdir()).iterdir():
            found = ours.fullmatch(folder.name)
            if found and not is_alive(int(found[1])) and _is_mine(folder):
                for left in SEMAPHORES.glob(f"sem.loky-{found[1]}-*"):
                    if _is_mine(left):
                        left.unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)


def _is_mine(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.getuid()
    except OSError:
        return False
