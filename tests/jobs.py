"""Compose and run whole jobs in this process, as `python -m experiments.run` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from uvm_kv.config.command import compose_config
from uvm_kv.config.names import with_implied
from uvm_kv.job.build import Job, jobs_of
from uvm_kv.job.resolve import Resolved, resolve
from uvm_kv.peers.job import run_any_job

MECHANISMS = (
    "device_resident",
    "device_recompute",
    "pinned_swap",
    "pinned_zero_copy",
    "pinned_prefetch_ahead",
    "pinned_balanced",
    "managed_demand",
    "managed_by_tier",
)


def composed(*overrides: str) -> DictConfig:
    return compose_config(with_implied(list(overrides)))


def resolved(*overrides: str) -> Resolved:
    return resolve(composed(*overrides))


def job(results_dir: Path, *overrides: str) -> Job:
    return jobs_of(resolved(*overrides, f"results_dir={results_dir}"), "test")[0]


def run(results_dir: Path, *overrides: str) -> dict[str, Any]:
    """The summary of one run."""
    return run_any_job(job(results_dir, *overrides), argv=["test"])
