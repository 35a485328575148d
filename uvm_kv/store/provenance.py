"""What produced a run: code, versions, machine, GPU. Every probe is guarded; what cannot be found out is None."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = ("uvm-kv", "numpy", "pyarrow", "hydra-core", "omegaconf", "torch", "transformers")


def _run(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def git_state() -> dict[str, Any]:
    """Commit of the checkout this package lies in, and whether tracked files differ from it; None in a wheel, whatever
    repository its environment lies in."""
    if not (Path(__file__).parents[2] / ".git").exists():
        return {"git_sha": None, "git_dirty": None}
    status = _run("git", "status", "--porcelain", "--untracked-files=no")
    return {"git_sha": _run("git", "rev-parse", "HEAD"), "git_dirty": None if status is None else bool(status)}


@cache
def gpu() -> dict[str, str] | None:
    out = _run("nvidia-smi", "--query-gpu=name,uuid,driver_version", "--format=csv,noheader")
    if not out:
        return None
    cells = [cell.strip() for cell in out.splitlines()[0].split(",")]
    if len(cells) != 3:
        return None  # "No devices were found", with status 0.
    name, uuid, driver = cells
    return {"name": name, "uuid": uuid, "driver": driver}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def versions() -> dict[str, str | None]:
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


@cache
def machine() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "os": platform.platform(),
        "processor": platform.machine(),
        "num_cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def manifest(
    *,
    code_sha256: str,
    memory_emulated: bool,
    weights: str | None,
    argv: list[str],
    seed: int,
    repeat: int,
    started: str,
    duration_s: float,
    eviction: str | None = None,
) -> dict[str, Any]:
    """`code_sha256`: of the code that ran (`uvm_kv.store.code`). `memory_emulated`: both tiers were CPU memory,
    whatever the memory kind. `weights` of a real model: file or random. `argv`: the command that was typed. `seed` and
    `repeat`: what the run drew from. `started`: local time in ISO 8601. `duration_s`: wall clock of the run.
    `eviction`: planned, where a policy makes a large card behave like a small one; never the driver's.
    """
    return {
        "code_sha256": code_sha256,
        **git_state(),
        "versions": versions(),
        "machine": machine(),
        "gpu": gpu(),
        "memory_emulated": memory_emulated,
        "weights": weights,
        "eviction": eviction,
        "seed": seed,
        "repeat": repeat,
        "argv": argv,
        "started": started,
        "duration_s": round(duration_s, 3),
    }
