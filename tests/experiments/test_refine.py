"""refine=true: the best batch of each mechanism is searched around those of a sweep, and what is finished is reused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.experiments.test_run import run, stamps
from uvm_kv.job.build import Job
from uvm_kv.store.directories import read_json
from uvm_kv.store.whole import completed_runs
from uvm_kv.sweep import refine

SMALL = ("workload.prompt_tokens=32", "workload.output_tokens=32", "memory.device_kv_bytes=134217728", "model=llama_7b")
"""16 blocks of 16 tokens: 4 requests with prompt plus output."""


def points(printed: str) -> pd.DataFrame:
    (line,) = (line for line in printed.splitlines() if line.startswith("table: "))
    return pd.read_csv(line.removeprefix("table: "))


def test_the_cliff_is_found_and_a_second_start_runs_nothing(tmp_path: Path) -> None:
    sweep = ("-m", "mechanism=device_resident,device_recompute,pinned_swap", "batch_size=3,9", *SMALL)
    coarse = run(*sweep, f"results_dir={tmp_path}")
    assert coarse.returncode == 0, coarse.stderr
    assert "cannot say: device_recompute may be up to " in coarse.stdout
    assert "refine=true" in coarse.stdout.partition("Run: ")[2]
    done = run(*sweep, "refine=true", f"results_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "cannot say" not in done.stdout and "Verdict: " in done.stdout
    table = points(done.stdout)
    recompute = table[table["mechanism"] == "device_recompute"].sort_values("offered_batch")
    free = recompute[recompute["preemptions"] == 0]["offered_batch"].max()
    assert free + 1 in set(recompute["offered_batch"]), "the first batch that preempts is known"
    assert 4 <= free < 9
    swap = table[(table["mechanism"] == "pinned_swap") & (table["h2d_bytes"] > 0)]
    assert len(swap) > 2
    before = stamps(tmp_path)
    again = run(*sweep, "refine=true", f"results_dir={tmp_path}")
    assert again.returncode == 0 and stamps(tmp_path) == before
    assert f"{len(before)} of {len(before)} runs are complete ({len(before)} were complete already)" in again.stderr


def test_drawn_lengths_are_compared_over_five_draws(tmp_path: Path) -> None:
    done = run(
        *("-m", "mechanism=device_resident,device_recompute,pinned_swap", "batch_size=8,24", "workload=sharegpt_vllm"),
        *("model=llama_7b", "memory.device_kv_bytes=4294967296", "refine=true", f"results_dir={tmp_path}"),
    )
    assert done.returncode == 0, done.stderr
    assert "(5 paired draws; up to " in done.stdout, done.stdout
    summaries = [read_json(d / "summary.json") for d in completed_runs(tmp_path)]
    draws = pd.DataFrame(summaries).groupby(["mechanism", "offered_batch"])["repeat"].apply(set)
    assert sum(found == {0, 1, 2, 3, 4} for found in draws) >= 3, "both baselines and the challenger"
    assert min(map(len, draws)) == 1, "what only the search tried is drawn once"
    num = len(summaries)
    assert f"{num} of {num} runs are complete, 0 failed" in done.stderr, "a searched run that is drawn counts once"


def test_a_batch_whose_activations_do_not_fit_ends_the_search_and_not_the_sweep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 9.25 GB of KV beside Llama-3-8B, the logits of a few hundred sequences fill the rest of the card."""
    overrides = ("model=llama3_8b", "memory.device_kv_bytes=9250000000", "mechanism=device_resident")
    lengths = ("workload.prompt_tokens=16", "workload.output_tokens=4")

    def summary(batch_size: int) -> dict[str, Any]:
        told = {"offered_batch": batch_size, "running_batch_mean": float(batch_size), "waiting_batch_mean": 0.0}
        told |= {"preemptions": 0, "drawn": False}
        return told | {"output_tokens_per_s": 10.0 * batch_size, "h2d_bytes": 0, "d2h_bytes": 0}

    def made_up(line: refine.Line, job: Job) -> dict[str, Any]:
        return summary(job.resolved.config.batch_size)

    monkeypatch.setattr(refine, "_run", made_up)
    line = refine.Line("", "device_resident", (*overrides, *lengths), "adhoc", None, (summary(256),), frozenset())
    found = refine._search(line)
    largest = max(it["offered_batch"] for it in found.summaries)
    assert 256 < largest < 2048
    assert len(found.finished) == len(found.summaries) - 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("refine=true",), "refine=true searches around the batch sizes of a sweep; add -m, or drop it"),
        (("-m", "refine=true", "runner=cuda", "batch_size=1,2"), "only simulated points are searched"),
        (("-m", "refine=perhaps", "batch_size=1,2"), "refine"),
    ],
)
def test_where_it_cannot_be_it_is_refused(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    failed = run(*arguments, f"results_dir={tmp_path}")
    assert failed.returncode == 2
    assert said in failed.stderr and failed.stderr.count("\n") == 1
