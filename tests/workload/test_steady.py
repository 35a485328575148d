"""A closed loop that begins in its steady state: which requests it has under way, and that this is what it comes to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers import ScriptedRunner, drive, make_context, make_scheduler, plans_of
from tests.jobs import job, run
from uvm_kv.job.build import build_source, run_job, workload_of
from uvm_kv.store.directories import read_plans
from uvm_kv.types import Phase
from uvm_kv.workload.lengths import Lengths
from uvm_kv.workload.source import ClosedLoop, filled_request
from uvm_kv.workload.steady import continued, nearest_to_mean, steady_start


@pytest.mark.parametrize(
    ("prompt", "output", "done"), [(7, 5, 0), (7, 5, 3), (7, 5, 4), (7, 1, 0), (1, 2, 0), (1, 1, 0)]
)
def test_a_filled_request_goes_on_where_a_served_one_would_be(prompt: int, output: int, done: int) -> None:
    """It has the length of the whole request, at least one token to put out, and one known token without KV."""
    request = filled_request(3, prompt, output, 9, num_done=done)
    assert (request.id, request.arrival_ns, request.max_tokens) == (3, 9, prompt + output)
    assert request.num_filled_tokens == request.num_computed == request.prompt_tokens - 1
    assert request.output_tokens == max(1, output - done - 1)


def test_it_decodes_at_the_contexts_of_a_request_that_was_served() -> None:
    def decodes(filled: bool) -> list[int]:
        context = make_context(16)
        lengths = [Lengths(6, 9)]
        source = ClosedLoop(lengths, 1, steady=[filled_request(0, 6, 9)] if filled else None)
        if not filled:
            (first,) = source.arrivals(0)
            first.output_tokens = 9
            source = ClosedLoop(lengths, 1, steady=[first])
        plans = plans_of(drive(make_scheduler(context), ScriptedRunner(context), source))
        return [s.context_len for plan in plans for s in plan.scheduled if s.phase is Phase.DECODE]

    assert decodes(True) == decodes(False) == [6, 7, 8, 9, 10, 11, 12, 13]


def test_contexts_are_spread_whichever_of_them_find_room() -> None:
    requests = steady_start([Lengths(100, 1000)] * 80, 40, 32, np.random.default_rng(0))
    assert [r.id for r in requests] == list(range(40))
    done = np.array([r.num_filled_tokens - 100 for r in requests])
    assert (done[32:] == 0).all()
    for some in (done[:32], done[:16], done[16:32], done[8:24]):
        assert some.mean() == pytest.approx(500, abs=70)
    assert np.histogram(done[:32], 8, (0, 1000))[0].min() >= 3


def test_a_long_output_is_met_in_proportion_to_its_length() -> None:
    lengths = [Lengths(8, 10), Lengths(8, 990)] * 100
    requests = steady_start(lengths, 100, 100, np.random.default_rng(0))
    assert sum(r.max_tokens == 998 for r in requests) >= 98


def test_the_seed_moves_the_spread() -> None:
    def filled(seed: int) -> list[int]:
        return [r.num_filled_tokens for r in steady_start([Lengths(8, 512)] * 8, 8, 8, np.random.default_rng(seed))]

    assert filled(1) == filled(1) != filled(2)


def test_the_window_nearest_to_the_mean() -> None:
    assert nearest_to_mean([9, 9, 9, 1, 5, 5, 1, 1], 2) == 2  # 9 and 1: 5, as all of them.
    assert nearest_to_mean([4] * 5, 3) == 0


def test_what_was_preempted_by_recompute_is_prefilled() -> None:
    request = filled_request(5, 10, 10, num_done=3)
    assert continued(0, request).num_filled_tokens == 13
    request.num_preemptions, request.num_computed = 1, 0
    again = continued(0, request)
    assert (again.prompt_tokens, again.output_tokens, again.num_filled_tokens) == (14, 6, 0)


@pytest.mark.parametrize("mechanism", ["device_recompute", "pinned_swap", "managed_demand_capped"])
def test_nothing_is_prefilled_but_what_was_preempted(tmp_path: Path, mechanism: str) -> None:
    """This holds also for later requests. The plans equal those of the requests alone, and a checking runner accepts
    them."""
    overrides = (f"mechanism={mechanism}", "batch_size=12", "workload.prompt_tokens=40", "workload.output_tokens=60")
    one = job(
        tmp_path, *overrides, "workload.start=steady", "record_plans=true", "max_steps=150",
        "memory.device_kv_bytes=400000000", "scheduler.max_num_batched_tokens=64",
    )  # fmt: skip
    summary = run_job(one, argv=[])
    plans = plans_of(read_plans(one.directory))
    began = {r.id for r in build_source(one, workload_of(one)).arrivals(0) if r.num_filled_tokens}
    seen: set[int] = set()
    preempted: set[int] = set()
    for plan in plans:
        preempted |= set(plan.dropped)
        for s in plan.scheduled:
            is_filled = s.request_id in began or s.request_id >= 12
            if s.request_id not in seen and is_filled:
                assert s.phase is Phase.DECODE and s.context_len >= 40
            assert s.phase is Phase.DECODE or s.request_id in preempted or not is_filled
            seen.add(s.request_id)
    assert max(seen) > 12
    if mechanism != "managed_demand_capped":
        assert summary["preemptions"] > 0


STEADY = ("workload.prompt_tokens=8", "workload.output_tokens=256", "memory.device_kv_bytes=2147483648")


@pytest.mark.parametrize(
    ("mechanism", "batch_size", "num_steps", "tolerance"),
    [
        ("device_resident", 15, 64, 0.01),
        ("device_recompute", 15, 64, 0.01),
        ("pinned_balanced", 15, 64, 0.02),
        ("pinned_zero_copy", 32, 64, 0.05),
        ("pinned_prefetch_ahead", 32, 64, 0.06),
        ("managed_by_tier", 32, 64, 0.05),
        # It thrashes. Its pages begin in better order than a long run leaves them in: 34.6, 33.0 and 32.2 tokens/s over
        # 64, 256 and 512 steps, against 28.1.
        ("managed_demand", 32, 64, 0.25),
        # Their batch swings between 20 and 32 with the length of an output.
        ("device_recompute", 32, 256, 0.02),
        ("pinned_swap", 32, 256, 0.02),
    ],
)
def test_a_steady_start_is_as_fast_as_a_long_run(
    tmp_path: Path, mechanism: str, batch_size: int, num_steps: int, tolerance: float
) -> None:
    """Checked within and beyond the device tier, against the steady window of a run that begins cold. Prefill, which
    the steady run leaves out, is little of the long one: its prompts are short."""
    shared = (f"mechanism={mechanism}", f"batch_size={batch_size}", *STEADY)
    cold = run(tmp_path, *shared)
    steady = run(tmp_path, *shared, "workload.start=steady", f"max_steps={num_steps}")
    assert steady["num_steps"] == num_steps
    assert steady["output_tokens_per_s"] == pytest.approx(cold["output_tokens_per_s"], rel=tolerance)
    assert steady["running_batch_mean"] == pytest.approx(cold["running_batch_mean"], rel=0.05)
    assert steady["kv_bytes_mean"]["used"] == pytest.approx(cold["kv_bytes_mean"]["used"], rel=0.15)


def test_more_clients_than_fit_wait_with_new_requests(tmp_path: Path) -> None:
    """Requests under way are spread, so that one ends every few steps and a new one takes its place."""
    one = job(tmp_path, "mechanism=device_resident", "batch_size=40", *STEADY, "workload.start=steady", "max_steps=64")
    requests = build_source(one, workload_of(one)).arrivals(0)
    filled = [r.num_filled_tokens for r in requests]
    assert filled[15:] == [8] * 25
    assert max(filled[:15]) > 230 and min(filled[:15]) < 40
    summary = run_job(one, argv=[])
    assert summary["running_batch_mean"] == 15


def test_what_the_summary_says(tmp_path: Path) -> None:
    shared = ("batch_size=4", "workload.prompt_tokens=16", "workload.output_tokens=32")
    cold = run(tmp_path, *shared)
    assert (cold["start"], cold["stopped_by"], cold["weights"]) == ("cold", "done", None)
    steady = run(tmp_path, *shared, "workload.start=steady", "max_steps=20")
    assert (steady["start"], steady["stopped_by"], steady["warnings"]) == ("steady", "steps", [])
    assert steady["steady_window_s"] == [0, steady["duration_s"]]
    assert steady["output_tokens_per_s"] == steady["output_tokens_per_s_whole_run"]
    assert steady["ttft_s"]["mean"] is None
    assert steady["tpot_s"]["mean"] > 0
    assert cold["setting"]["workload.start"] != steady["setting"]["workload.start"]


def test_a_loop_that_runs_dry_is_steady_until_its_last_admission(tmp_path: Path) -> None:
    shared = ("batch_size=4", "workload.prompt_tokens=16", "workload.output_tokens=32", "workload.start=steady")
    whole = run(tmp_path, *shared, "workload.num_requests=12")
    assert whole["stopped_by"] == "done"
    assert whole["running_batch_mean"] == 4
    assert whole["steady_window_s"][1] < whole["duration_s"]
    only = run(tmp_path, *shared, "workload.num_requests=4")
    assert only["output_tokens_per_s"] is None and "no steady window" in only["warnings"][0]


def test_max_seconds_stops_the_run_at_the_runners_clock(tmp_path: Path) -> None:
    shared = ("batch_size=4", "workload.prompt_tokens=16", "workload.output_tokens=256", "workload.start=steady")
    summary = run(tmp_path, *shared, "max_seconds=0.5", "max_steps=1000")
    assert summary["stopped_by"] == "seconds"
    assert 0.5 <= summary["duration_s"] < 0.6
    assert run(tmp_path, *shared, "max_seconds=1000", "max_steps=7")["stopped_by"] == "steps"
    # It does not idle beyond that, either.
    late = run(tmp_path, "workload.arrival=poisson", "workload.request_rate=0.001", "max_seconds=2")
    assert (late["stopped_by"], late["num_requests"]) == ("seconds", 0)
