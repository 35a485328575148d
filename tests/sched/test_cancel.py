"""Scheduler.cancel: from every state, what it frees, what it leaves alone, and when it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers import ScriptedRunner, make_context, make_request, make_scheduler, step, submit
from uvm_kv.runner.base import ModelRunner
from uvm_kv.sched.batching import StaticBatching
from uvm_kv.sched.request import Request, Status
from uvm_kv.sched.scheduler import Scheduler
from uvm_kv.types import Allocation, Tier

SWAP: dict[str, Any] = {"admission": "optimistic", "preemption": "swap"}
RECOMPUTE: dict[str, Any] = {"admission": "optimistic", "preemption": "recompute"}


def cancel(scheduler: Scheduler, runner: ModelRunner, request_id: int) -> Request | None:
    request = scheduler.cancel(request_id)
    if request is not None:
        runner.remove(request_id)
    scheduler.check_integrity()
    return request


def serve_rest(scheduler: Scheduler, runner: ModelRunner, *requests: Request) -> None:
    """All others are served to their end, and nothing stays taken."""
    while scheduler.has_work():
        assert step(scheduler, runner) is not None
    assert all(r.status is Status.FINISHED and r.num_generated == r.output_tokens for r in requests)
    assert [scheduler.kv.available(tier) for tier in Tier] == list(scheduler.kv.capacity)
    assert [scheduler.kv.pool.num_free(tier) for tier in Tier] == list(scheduler.kv.capacity)


def assert_cancelled(scheduler: Scheduler, request: Request) -> None:
    assert (request.status, request.finish_ns) == (Status.CANCELLED, None)
    assert scheduler.num_cancelled == 1
    assert request not in (*scheduler.running, *scheduler.waiting, *scheduler.swapped)


def test_a_running_request_gives_its_blocks_and_its_claim_back_at_once() -> None:
    context = make_context(8)
    scheduler, runner = make_scheduler(context), ScriptedRunner(context)
    first, second = make_request(0, 4, 12), make_request(1, 4, 12)
    submit(scheduler, runner, first, second)
    step(scheduler, runner)
    assert scheduler.kv.available(Tier.DEVICE) == 0
    assert cancel(scheduler, runner, 0) is first
    assert_cancelled(scheduler, first)
    assert scheduler.kv.available(Tier.DEVICE) == 4 and scheduler.num_context_tokens == 4
    assert first.num_generated == 1 and first.first_token_ns is not None, "what it put out is not undone"
    serve_rest(scheduler, runner, second)


def test_a_request_in_the_middle_of_its_prefill() -> None:
    context = make_context(12)
    scheduler, runner = make_scheduler(context, max_num_batched_tokens=6), ScriptedRunner(context)
    first, second = make_request(0, 20, 4), make_request(1, 5, 4)
    submit(scheduler, runner, first, second)
    step(scheduler, runner)
    assert 0 < first.num_computed < first.prompt_tokens
    assert cancel(scheduler, runner, 0) is first
    assert_cancelled(scheduler, first)
    assert first.first_token_ns is None
    serve_rest(scheduler, runner, second)


def test_a_waiting_request_does_not_hold_up_those_behind_it() -> None:
    """Its four blocks would have to wait for the first to end; the last one's two are free now."""
    context = make_context(6)
    scheduler, runner = make_scheduler(context), ScriptedRunner(context)
    requests = [make_request(0, 4, 12), make_request(1, 12, 4), make_request(2, 4, 4)]
    submit(scheduler, runner, *requests)
    step(scheduler, runner)
    assert requests[2].status is Status.WAITING
    assert cancel(scheduler, runner, 1) is requests[1]
    assert_cancelled(scheduler, requests[1])
    assert requests[1].admitted_ns is None
    step(scheduler, runner)
    assert requests[2].status is Status.RUNNING
    serve_rest(scheduler, runner, requests[0], requests[2])


@pytest.mark.parametrize(("options", "status"), [(SWAP, Status.SWAPPED), (RECOMPUTE, Status.WAITING)])
def test_a_preempted_request(options: dict[str, Any], status: Status) -> None:
    """Its preemption stays counted; the host blocks of a swapped one are free."""
    context = make_context(5, 4)
    scheduler, runner = make_scheduler(context, **options), ScriptedRunner(context)
    first, second = make_request(0, 8, 10), make_request(1, 8, 10)
    submit(scheduler, runner, first, second)
    while not second.num_preemptions:
        step(scheduler, runner)
    assert second.status is status
    assert (scheduler.kv.available(Tier.HOST) < 4) == (status is Status.SWAPPED)
    assert cancel(scheduler, runner, 1) is second
    assert_cancelled(scheduler, second)
    assert scheduler.num_swapped_out + scheduler.num_recomputed == 1
    assert scheduler.kv.available(Tier.HOST) == 4 and scheduler.num_swapped_tokens == 0
    serve_rest(scheduler, runner, first)


def test_host_blocks_of_a_split_table_are_free_again() -> None:
    context = make_context(4, 4)
    scheduler, runner = make_scheduler(context, placement="static_split"), ScriptedRunner(context)
    first, second = make_request(0, 12, 4), make_request(1, 12, 4)
    submit(scheduler, runner, first, second)
    step(scheduler, runner)
    assert len(scheduler.kv.host_blocks) == 3
    cancel(scheduler, runner, 1)
    assert scheduler.kv.host_blocks == () and scheduler.kv.available(Tier.HOST) == 4
    serve_rest(scheduler, runner, first)


def test_an_unknown_or_ended_request_is_none_and_changes_nothing() -> None:
    context = make_context(8)
    scheduler, runner = make_scheduler(context), ScriptedRunner(context)
    first, second = make_request(0, 4, 1), make_request(1, 4, 3)
    submit(scheduler, runner, first, second)
    step(scheduler, runner)
    assert first.status is Status.FINISHED
    for request_id in (0, 7, -1):
        assert cancel(scheduler, runner, request_id) is None
    assert (scheduler.num_cancelled, first.status, first.finish_ns) == (0, Status.FINISHED, runner.now_ns())
    assert cancel(scheduler, runner, 1) is second
    assert cancel(scheduler, runner, 1) is None, "it was cancelled before"
    assert scheduler.num_cancelled == 1
    assert scheduler.schedule(runner.now_ns()) is None


@pytest.mark.parametrize("request_id", [0, 1, 9], ids=["in the plan", "waiting", "unknown"])
def test_between_schedule_and_update_it_is_refused(request_id: int) -> None:
    context = make_context(8)
    scheduler, runner = make_scheduler(context, batch_size=1), ScriptedRunner(context)
    requests = [make_request(0, 4, 3), make_request(1, 4, 3)]
    submit(scheduler, runner, *requests)
    plan = scheduler.schedule(0)
    assert plan is not None
    with pytest.raises(RuntimeError, match=f"request {request_id} is cancelled while a step is under way; call update"):
        scheduler.cancel(request_id)
    assert scheduler.num_cancelled == 0 and [r.status for r in requests] == [Status.RUNNING, Status.WAITING]
    scheduler.update(plan, runner.execute(plan))
    serve_rest(scheduler, runner, *requests)


def test_a_later_request_may_have_the_id_again() -> None:
    context = make_context(8)
    scheduler, runner = make_scheduler(context), ScriptedRunner(context)
    submit(scheduler, runner, make_request(0, 4, 8))
    step(scheduler, runner)
    cancel(scheduler, runner, 0)
    again = make_request(0, 6, 5)
    submit(scheduler, runner, again)
    serve_rest(scheduler, runner, again)


def test_a_plan_does_not_drop_what_the_runner_has_forgotten() -> None:
    """A preempted request that no step has told the runner of yet: it preempted itself, and must wait for a batch."""
    context = make_context(5)
    options = RECOMPUTE | {"allocation": Allocation.ON_DEMAND, "batching": StaticBatching(2)}
    scheduler, runner = make_scheduler(context, **options), ScriptedRunner(context)
    first, second = make_request(0, 8, 1), make_request(1, 8, 10)
    submit(scheduler, runner, first, second)
    while step(scheduler, runner, more_to_come=True) is not None:
        pass
    assert (second.status, second.num_preemptions) == (Status.WAITING, 1)
    cancel(scheduler, runner, 1)
    late = make_request(2, 4, 4)
    submit(scheduler, runner, late)
    plan = step(scheduler, runner)
    assert plan is not None and plan.dropped == ()
    serve_rest(scheduler, runner, late)


def test_a_batch_whose_rest_is_cancelled_takes_no_later_arrival() -> None:
    """The second prompt waits for the next step's tokens; without it the batch is complete, and a static one closed."""
    context = make_context(20)
    scheduler = make_scheduler(context, batching=StaticBatching(2), max_num_batched_tokens=8)
    runner = ScriptedRunner(context)
    first, second, late = make_request(0, 8, 6), make_request(1, 8, 6), make_request(2, 4, 2)
    submit(scheduler, runner, first, second)
    step(scheduler, runner)
    assert second.status is Status.WAITING
    cancel(scheduler, runner, 1)
    submit(scheduler, runner, late)
    step(scheduler, runner)
    assert (first.status, late.status) == (Status.RUNNING, Status.WAITING)
    serve_rest(scheduler, runner, first, late)
