"""A job that serves a trace file: read once, only as far as it is needed, and what is left out is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import composed, job, resolved, run
from uvm_kv.job import workload
from uvm_kv.job.build import jobs_of, run_job
from uvm_kv.job.resolve import resolve
from uvm_kv.sweep.listing import estimate_s
from uvm_kv.workload.trace import read_trace


def trace_file(folder: Path, num_rows: int = 1000) -> Path:
    path = folder / "trace.csv"
    rows = "".join(f"{i},{16 + i % 7},4\n" for i in range(num_rows))
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows + "this line is never read\n")
    return path


def test_a_job_reads_its_trace_once_and_no_further_than_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def counting(path: str, **how: Any) -> Any:
        trace = read_trace(path, **how)
        taken.append(len(trace.rows))
        return trace

    monkeypatch.setattr(workload, "read_trace", counting)
    given = (
        "workload=trace",
        f"workload.path={trace_file(tmp_path)}",
        "workload.num_requests=100",
        "num_repeats=2",
        f"results_dir={tmp_path}",
        "model=smollm2_135m",
    )
    jobs = jobs_of(resolve(composed(*given)), "test")
    for one in jobs:
        estimate_s(one)
        assert run_job(one, argv=["test"])["num_requests"] == 100
    assert taken == [100]


def test_the_id_is_of_the_content_of_the_whole_file(tmp_path: Path) -> None:
    path = trace_file(tmp_path)
    given = ("workload=trace", f"workload.path={path}", "workload.num_requests=10")
    first = resolved(*given).determining()
    path.write_text(path.read_text().replace("999,", "998.5,"))
    assert resolved(*given).determining() != first


def test_what_of_a_trace_is_not_served_is_said(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 1000 * i, "input_length": n, "output_length": out, "hash_ids": [0, i]}
        for i, (n, out) in enumerate([(100, 5), (200, 0), (9000, 5), (300, 5)])
    ]
    path = tmp_path / "mooncake.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    given = ("workload=trace", f"workload.path={path}", "model=llama3_8b")
    with pytest.raises(ValueError, match=r"line 3: 9000 prompt and 5 output tokens exceed the 8192 of .*too_long=drop"):
        job(tmp_path, *given)
    summary = run(tmp_path, *given, "workload.too_long=drop", "mechanism=pinned_swap")
    assert (summary["num_requests"], summary["num_left_out"]) == (2, 1)
    assert "1 requests of the trace have no prompt or no output, failed and are left out" in summary["warnings"]
    assert any(text.startswith("hash_ids of the trace are not used") for text in summary["warnings"])
