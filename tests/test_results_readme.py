"""results/README.md explains every field that a run writes."""

from __future__ import annotations

import re
from pathlib import Path

from tests import jobs
from uvm_kv.config.build import run_job
from uvm_kv.telemetry.store import read_table

README = (Path(__file__).parent.parent / "results" / "README.md").read_text()


def test_every_column_is_explained(tmp_path: Path) -> None:
    job = jobs.job(tmp_path, "mechanism=pinned_swap", "batch_size=4", "max_steps=20")
    summary = run_job(job, argv=["test"])
    explained = set(re.findall(r"`([\w.]+)`", README))
    nested = [key for name in ("kv_bytes_mean", "preemptions_by_kind") for key in summary[name]]
    assert {*summary, *nested} - explained == set()
    columns = [*read_table(job.directory, "steps"), *read_table(job.directory, "requests")]
    patterns = [r"kv_\w+_bytes", r"(h2d|d2h)_\w+_bytes"]
    left = [c for c in columns if c not in explained and not any(re.fullmatch(p, c) for p in patterns)]
    assert left == []
