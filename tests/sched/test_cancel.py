"""Cancelling a request in every status, and while a step that serves it is in flight."""

from __future__ import annotations

import pytest

from tests.helpers import (
    Preemption,
    ScriptedRunner,
    make_context,
    make_request,
    make_requests,
    make_scheduler,
    step,
    submit,
)
from uvm_kv.sched.request import Request, Status
from uvm_kv.sched.scheduler import Scheduler
from uvm_kv.types import Tier


def preempting(preemption: Preemption) -> tuple[Scheduler, ScriptedRunner]:
    """Requests 0 and 1 on four blocks, one step after the second had to give way; 2 has never run."""
    context = make_context(4, 4)
    scheduler = make_scheduler(context, admission="optimistic", preemption=preemption)
    runner = ScriptedRunner(context)
    submit(scheduler, runner, *make_requests([(8, 6), (7, 6), (4, 4)]))
    while not (scheduler.num_recomputed + scheduler.num_swapped_out):
        step(scheduler, runner)
    return scheduler, runner


def drain(scheduler: Scheduler, runner: ScriptedRunner) -> None:
    while scheduler.has_work():
        assert step(scheduler, runner) is not None
    assert scheduler.kv.available(Tier.DEVICE) == 4
    assert scheduler.kv.available(Tier.HOST) == 4


@pytest.mark.parametrize(
    ("preemption", "request_id", "status"),
    [
        ("recompute", 0, Status.RUNNING),
        ("recompute", 1, Status.WAITING),
        ("recompute", 2, Status.WAITING),
        ("swap", 0, Status.RUNNING),
        ("swap", 1, Status.SWAPPED),
    ],
)
def test_a_cancelled_request_leaves_nothing_behind(preemption: Preemption, request_id: int, status: Status) -> None:
    scheduler, runner = preempting(preemption)
    queues = [*scheduler.running, *scheduler.swapped, *scheduler.waiting]
    (request,) = [r for r in queues if r.id == request_id]
    assert request.status is status
    assert scheduler.cancel(request_id)
    runner.remove(request_id)
    assert request.status is Status.CANCELLED
    scheduler.check_integrity()
    drain(scheduler, runner)
    assert request.finish_ns is None
    assert not scheduler.cancel(request_id)


def cancelled_in_flight() -> tuple[Scheduler, ScriptedRunner, list[Request]]:
    """Three prompts of two tokens in one step; the second is cancelled before the step is booked."""
    context = make_context(8)
    scheduler = make_scheduler(context)
    runner = ScriptedRunner(context, token_of=lambda request_id, position: 10 * request_id + position)
    requests = [make_request(i, 2, 3) for i in range(3)]
    submit(scheduler, runner, *requests)
    plan = scheduler.schedule(0)
    assert plan is not None
    output = runner.execute(plan)
    assert scheduler.cancel(1)
    assert scheduler.update(plan, output) == []
    runner.remove(1)
    scheduler.check_integrity()
    return scheduler, runner, requests


def test_a_request_cancelled_in_flight_counts_neither_tokens_in_nor_out() -> None:
    scheduler, _, _ = cancelled_in_flight()
    assert (scheduler.num_sampled, scheduler.num_scheduled_tokens) == (2, 4)


def test_cancelling_in_flight_shifts_nobody_elses_tokens() -> None:
    """The runner has sampled for the cancelled request too; its token is dropped, the others get their own."""
    scheduler, runner, requests = cancelled_in_flight()
    while scheduler.has_work():
        step(scheduler, runner)
    assert [r.token_ids for r in requests] == [[2, 3, 4], [], [22, 23, 24]]


def test_finished_and_unknown_requests_cannot_be_cancelled() -> None:
    context = make_context(8)
    scheduler, runner = make_scheduler(context), ScriptedRunner(context)
    submit(scheduler, runner, make_request(0, 2, 1))
    step(scheduler, runner)
    assert not scheduler.cancel(0)
    assert not scheduler.cancel(99)
