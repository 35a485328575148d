"""refine=true: the best batch of each mechanism is searched around those of a sweep, and what is finished is reused."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from tests.experiments.test_run import run, stamps
from uvm_kv.telemetry.store import read_json
from uvm_kv.telemetry.whole import completed_runs

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
