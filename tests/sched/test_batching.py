"""Static, dynamic and continuous batching: when waiting requests may join."""

from __future__ import annotations

import pytest

from tests.helpers import ScriptedRunner, drive, make_context, make_request, make_requests, make_scheduler, plans_of
from uvm_kv.sched.batching import Batching, ContinuousBatching, StaticBatching
from uvm_kv.sched.plan import StepPlan
from uvm_kv.sched.request import Request
from uvm_kv.types import Phase


def batches(plans: list[StepPlan]) -> list[tuple[int, ...]]:
    """Who runs together, each set once in order of its first step."""
    return list(dict.fromkeys(tuple(s.request_id for s in plan.scheduled) for plan in plans))


def run(batching: Batching, requests: list[Request], *, budget: int = 64) -> list[StepPlan]:
    context = make_context(64)
    scheduler = make_scheduler(context, batching=batching, max_num_batched_tokens=budget)
    return plans_of(drive(scheduler, ScriptedRunner(context, step_ns=10), requests))


def test_a_static_batch_is_full_and_runs_to_its_end() -> None:
    """The two long ones outlive the short one, and nobody takes its place."""
    plans = run(StaticBatching(3), make_requests([(4, 5), (4, 1), (4, 5), (4, 1), (4, 1), (4, 1)]))
    assert batches(plans) == [(0, 1, 2), (0, 2), (3, 4, 5)]


def test_a_static_batch_waits_to_be_full_or_for_the_last_arrival() -> None:
    """Arrivals every 1,000 ns, far longer than a request runs: pairs, and then the odd one out."""
    requests = [make_request(i, 4, 2, arrival_ns=1_000 * i) for i in range(5)]
    assert batches(run(StaticBatching(2), requests)) == [(0, 1), (2, 3), (4,)]
    assert [r.admitted_ns for r in requests] == [1_000, 1_000, 3_000, 3_000, 4_000]


@pytest.mark.parametrize("batching", [StaticBatching(4), StaticBatching(4, 50)], ids=["static", "dynamic"])
def test_a_batch_whose_prompts_exceed_the_token_budget_is_still_one_batch(batching: Batching) -> None:
    """Scenario: four prompts of 8 tokens at 8 tokens per step. They enter one by one, and then decode together."""
    plans = run(batching, make_requests([(8, 12)] * 4), budget=8)
    assert max(len(plan.scheduled) for plan in plans) == 4


def test_a_dynamic_batch_closes_after_its_window() -> None:
    requests = [make_request(i, 4, 2, arrival_ns=t) for i, t in enumerate((0, 60, 300, 310))]
    assert batches(run(StaticBatching(8, 100), requests)) == [(0, 1), (2, 3)]
    assert [r.admitted_ns for r in requests] == [100, 100, 400, 400]


def test_a_full_dynamic_batch_does_not_wait() -> None:
    requests = [make_request(i, 4, 2, arrival_ns=t) for i, t in enumerate((0, 7, 200))]
    assert batches(run(StaticBatching(2, 100), requests)) == [(0, 1), (2,)]
    assert [r.admitted_ns for r in requests] == [7, 7, 300]


def test_continuous_batching_fills_a_free_place_at_once() -> None:
    plans = run(ContinuousBatching(2), make_requests([(4, 4), (4, 2), (4, 2)]))
    assert batches(plans) == [(0, 1), (0, 2)]


def whole_prompts(requests: list[Request], *, budget: int, batching: Batching | None = None) -> list[StepPlan]:
    context = make_context(64)
    scheduler = make_scheduler(context, batching=batching, max_num_batched_tokens=budget, chunked_prefill=False)
    return plans_of(drive(scheduler, ScriptedRunner(context, step_ns=10), requests))


def test_without_chunks_a_prompt_is_computed_whole_in_a_step_of_prompts() -> None:
    """Budget 20, prompts of 12, 8, 4 and 9: two fill the first step, two more the second, then all decode together."""
    plans = whole_prompts(make_requests([(12, 4), (8, 4), (4, 4), (9, 4)]), budget=20)
    assert [[s.num_new_tokens for s in plan.scheduled] for plan in plans] == [[12, 8], [4, 9], *[[1, 1, 1, 1]] * 3]
    assert [{s.phase for s in plan.scheduled} for plan in plans] == [{Phase.PREFILL}] * 2 + [{Phase.DECODE}] * 3


def test_without_chunks_decodes_wait_for_a_prompt_that_arrives() -> None:
    """The second prompt comes while the first request decodes: a step of its own, in which nobody decodes."""
    first, second = make_request(0, 4, 6), make_request(1, 16, 2, arrival_ns=15)
    plans = whole_prompts([first, second], budget=18)
    assert [tuple(s.request_id for s in plan.scheduled) for plan in plans[:4]] == [(0,), (0,), (1,), (0, 1)]
    chunked = run(ContinuousBatching(8), [make_request(0, 4, 6), make_request(1, 16, 2, arrival_ns=15)], budget=16)
    assert [s.num_new_tokens for s in chunked[2].scheduled] == [1, 15]


def test_a_batch_that_waits_for_others_takes_whole_prompts_too() -> None:
    plans = whole_prompts(make_requests([(8, 3)] * 4), budget=16, batching=StaticBatching(4))
    assert [len(plan.scheduled) for plan in plans] == [2, 2, 4, 4]


def test_a_request_that_no_step_holds_is_refused_without_chunks() -> None:
    scheduler = make_scheduler(make_context(64), max_num_batched_tokens=16, chunked_prefill=False)
    scheduler.add(make_request(0, 12, 4))
    with pytest.raises(ValueError, match="request 1: 17 tokens do not fit a step of 16"):
        scheduler.add(make_request(1, 12, 5))
