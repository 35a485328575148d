"""One hash of the code that determines a result: runs with different hashes are never put into one table.

The run id covers the resolved config, so conf/ is left out here. Code that only reads results, or only decides which
jobs there are, is left out too.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
WITHOUT_RESULT = (
    *("advise/", "calibrate/", "cli/", "commands/", "report/", "store/", "study/", "sweep/", "tracking/", "validate/"),
    *("config/command.py", "config/grammar.py", "config/ignored.py", "config/names.py", "config/shipped.py"),
    *("job/card.py", "job/recording.py", "job/roofline.py"),
)
"""Folders and files of the package that no number of a run depends on. All others count, new ones too."""
OF_RUNNERS = {
    "runner/sim/": ("sim",),
    "runner/replay/": ("replay",),
    "runner/torch/": ("cpu", "cuda"),
    "memory/": ("cuda",),
}
"""Folders that count for these runners alone."""


@cache
def code_sha256(runner: str) -> str:
    """Hash of the code in this process that determines a run with `runner`; with runner=cuda the sources that the
    extension was built of count too."""
    digest = hash_of(code_files(), runner)
    if runner != "cuda":
        return digest
    from uvm_kv.memory.extension import sources_sha256

    return _sha256(f"{digest} {sources_sha256()}".encode())


def is_of_other_code(manifest: dict[str, Any], runner: str) -> bool:
    """Whether a run was made by other code than that of this process, or by unknown code."""
    return bool(manifest.get("code_sha256") != code_sha256(runner))


@cache
def code_files(package: Path = PACKAGE) -> dict[str, str]:
    """Hashes of the Python files of the package by their paths in it. They are read once: what is edited while a
    process lives is not what it runs, so a process that runs jobs asks for them first."""
    return {
        file.relative_to(package).as_posix(): _sha256(file.read_bytes().replace(b"\r\n", b"\n"))  # As git has them.
        for file in package.rglob("*.py")
    }


def hash_of(files: dict[str, str], runner: str) -> str:
    """One hash of those of `code_files` that count for `runner`: the same on every machine."""
    counted = (f"{name} {sha256}\n" for name, sha256 in sorted(files.items()) if _counts(name, runner))
    return _sha256("".join(counted).encode())


def _counts(name: str, runner: str) -> bool:
    if name.startswith(WITHOUT_RESULT):
        return False
    return all(runner in runners for folder, runners in OF_RUNNERS.items() if name.startswith(folder))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
