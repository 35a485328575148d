"""The allocation study: shares that sum to the memory, and claims that follow the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests import jobs
from uvm_kv.job.build import run_job
from uvm_kv.report.load import load_runs
from uvm_kv.report.style import save_figure
from uvm_kv.store.records import read_records
from uvm_kv.study.allocation import PARTS, PUBLISHED, SCHEMES, STUDY, shares
from uvm_kv.workload.lengths import Quantiles, draw_lengths


def run_of(
    allocation: str, token_states: float, batch: float, *, rate: float = 20.0, seed: int = 0
) -> dict[str, object]:
    """A run whose token states take that share of 1000 bytes, and what is left in equal parts."""
    rest = (100 - token_states) / 3
    return {
        "id": f"{allocation}-{rate}-{seed}",
        "origin": "simulated",
        "hardware": "a_card",
        "model": "a_model",
        "workload": "w",
        "allocation": allocation,
        "request_rate": rate,
        "device_kv_bytes": 1000,
        "kv_bytes_mean.used": 10 * token_states,
        "kv_bytes_mean.future": 10 * rest,
        "kv_bytes_mean.reserved": 10 * (token_states + 2 * rest),
        "running_batch_mean": batch,
        "output_tokens_per_s": 100.0,
        "preemptions": 0,
        "setting": {"allocation": allocation, "workload.request_rate": rate, "block_size": 16},
    }


def as_published(**changed: float) -> pd.DataFrame:
    told = {a: p.token_states for a, p in PUBLISHED.items()} | {"reserve_max": 20.0, "on_demand": 80.0} | changed
    batches = {a: p.running_batch for a, p in PUBLISHED.items()} | {"reserve_max": 7.0, "on_demand": 25.0}
    return pd.DataFrame([run_of(a, told[a], batches[a], rate=rate) for a in told for rate in (20.0, 2.0)])


def test_shares_sum_to_the_memory_and_stand_in_order() -> None:
    table = shares(as_published())
    assert np.allclose(table[list(PARTS)].sum(axis=1), 100)
    assert list(table["allocation"]) == [*SCHEMES, *SCHEMES]
    assert list(table["request_rate"]) == [20.0] * 6 + [2.0] * 6
    assert table["published_token_states"].isna().sum() == 4  # Of reserve_max and on_demand nothing is published.


def test_claims_follow_the_data(tmp_path: Path) -> None:
    drawn = STUDY.draw(as_published(), [])
    assert drawn.headline is not None
    assert (
        "4 of 4 within 8 points, the largest difference 0.0" in drawn.headline and "in the same order" in drawn.headline
    )
    assert not any("Not within" in claim for claim in drawn.claims)
    assert [p.stat().st_size > 0 for p in save_figure(drawn.figure, tmp_path / "figure")] == [True, True]
    drawn = STUDY.draw(as_published(orca_pow2=46.8), [])
    assert drawn.headline is not None
    assert "3 of 4 within 8 points, the largest difference 20.0 (orca_pow2), not in the same" in drawn.headline
    assert "Not within 8 points: orca_pow2 by 20.0." in drawn.claims
    save_figure(drawn.figure, tmp_path / "figure")


def test_repeats_are_one_bar() -> None:
    runs = [run_of("paged", share, 30.0, seed=seed) for seed, share in enumerate((90.0, 91.0, 95.0))]
    table = shares(pd.DataFrame(runs))
    assert len(table) == 1 and table["token_states"][0] == pytest.approx(91.0)


def test_a_part_of_the_schemes_is_drawn_and_says_no_more_than_it_knows(tmp_path: Path) -> None:
    drawn = STUDY.draw(pd.DataFrame([run_of("on_demand", 80.0, 20.0)]), [])
    assert drawn.claims == []
    save_figure(drawn.figure, tmp_path / "figure")


def test_runs_of_an_older_version_are_refused() -> None:
    runs = as_published()
    with pytest.raises(ValueError, match=r"of a version that did not tell .* run experiment=allocation again"):
        STUDY.draw(runs.drop(columns="kv_bytes_mean.future"), [])
    runs.loc[3, "kv_bytes_mean.future"] = None
    with pytest.raises(ValueError, match="of a version that did not tell"):
        STUDY.draw(runs, [])


def test_runs_of_several_settings_are_refused() -> None:
    runs = as_published()
    runs.at[0, "setting"] = dict(runs["setting"][0]) | {"block_size": 32}
    with pytest.raises(ValueError, match=r"differ in more than allocation and request rate \(block_size\)"):
        STUDY.draw(runs, [])


def test_a_small_system_orders_the_schemes_as_published(tmp_path: Path) -> None:
    """The experiment itself on a quarter of its memory and requests: more tokens and requests, the less is reserved."""
    for allocation in SCHEMES:
        small = ("memory.device_kv_bytes=6442450944", "workload.num_requests=60", "workload.request_rate=50")
        run_job(jobs.job(tmp_path, "experiment=allocation", f"allocation={allocation}", *small), argv=["test"])
    table = shares(load_runs(read_records(tmp_path)[0])).set_index("allocation")
    assert np.allclose(table[list(PARTS)].sum(axis=1), 100)
    assert (table[list(PARTS)] >= 0).all(axis=None)
    order = ["orca_max", "orca_pow2", "orca_oracle", "paged"]
    assert (
        table["token_states"][order].is_monotonic_increasing and table["running_batch"][order].is_monotonic_increasing
    )
    assert table["token_states"]["reserve_max"] == pytest.approx(table["token_states"]["orca_max"], abs=0.5)
    assert table["internal"]["orca_max"] > table["internal"]["orca_pow2"] > 5 > table["internal"]["orca_oracle"]
    assert table["preemptions"][["reserve_max", "orca_max", "orca_pow2", "orca_oracle"]].eq(0).all()


def test_the_lengths_have_the_published_means() -> None:
    lengths = jobs.resolved("workload=sharegpt_vllm", "model=opt_13b", "hardware=a100_40g").config.workload.lengths
    assert lengths is not None
    sides = [Quantiles(tuple(q.probabilities), tuple(q.values)) for q in (lengths.prompt, lengths.output)]
    drawn, redrawn = draw_lengths(*sides, 20_000, 2048, np.random.default_rng(0))
    means = np.mean(drawn, axis=0)
    assert means == pytest.approx([161.31, 337.99], rel=2e-3)
    assert 0 < redrawn / 20_000 < 0.005 and max(map(sum, drawn)) <= 2048
    # Exponential: as long as its mean is, a request is longer than that with the same chance again.
    for side, scale in zip(sides, (160.5, 344.7), strict=True):
        for p in (0.1, 0.5, 0.9):
            assert np.interp(p, side.probabilities, side.values) == pytest.approx(
                -scale * np.log(1 - p), rel=0.03, abs=2
            )


def test_measured_rates_count_where_their_repeats_decide_and_origins_are_not_put_together() -> None:
    measured = as_published().assign(origin="measured")
    assert "AMBIGUOUS, which needs 3 repeats" in STUDY.draw(measured, []).claims[-1]
    assert "AMBIGUOUS" not in STUDY.draw(pd.concat([measured] * 3, ignore_index=True), []).claims[-1]
    with pytest.raises(ValueError, match=r"differ in more than allocation and request rate \(origin\)"):
        STUDY.draw(pd.concat([measured, as_published()], ignore_index=True), [])
