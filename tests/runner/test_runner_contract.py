"""What every runner promises, as far as it needs no model. A new runner inherits this by a line in RUNNERS."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.helpers import ScriptedRunner, drive, make_context, make_request, make_scheduler, make_sim
from uvm_kv.runner.base import ModelRunner
from uvm_kv.runner.replay import ReplayRunner
from uvm_kv.sched.plan import StepOutput, StepPlan
from uvm_kv.sched.request import Request
from uvm_kv.types import NS_PER_S

CONTEXT = make_context(12, 12)


def requests() -> list[Request]:
    """The last two arrive when all others have long ended, so that the runner idles."""
    arrivals = [0, 0, 10, 20, 50 * NS_PER_S, 60 * NS_PER_S]
    return [make_request(i, 3 + 2 * i, 4 + i, t) for i, t in enumerate(arrivals)]


def serve(runner: ModelRunner) -> list[tuple[StepPlan, StepOutput]]:
    scheduler = make_scheduler(CONTEXT, max_num_batched_tokens=9, admission="optimistic", preemption="recompute")
    return drive(scheduler, runner, requests())


RUNNERS: dict[str, Callable[[], ModelRunner]] = {
    "sim": lambda: make_sim(CONTEXT),
    "scripted": lambda: ScriptedRunner(CONTEXT, token_of=lambda *at: sum(at)),
    "replay": lambda: ReplayRunner(CONTEXT.capacity, serve(make_sim(CONTEXT))),
}

every_runner = pytest.mark.parametrize("make", RUNNERS.values(), ids=list(RUNNERS))


@every_runner
def test_the_clock_never_goes_back(make: Callable[[], ModelRunner]) -> None:
    """Steps follow one another, an idle clock reaches the arrival, and the runner's clock ends where the log does."""
    runner = make()
    log = serve(runner)
    now_ns = 0
    for _, output in log:
        assert type(output.timing.start_ns) is type(output.timing.end_ns) is int
        assert now_ns <= output.timing.start_ns < output.timing.end_ns
        now_ns = output.timing.end_ns
    assert runner.now_ns() == now_ns > 60 * NS_PER_S


@every_runner
def test_waiting_moves_the_clock_forward_only(make: Callable[[], ModelRunner]) -> None:
    runner = make()
    start = runner.now_ns()
    runner.wait_until_ns(start + 500)
    assert runner.now_ns() >= start + 500
    later = runner.now_ns()
    runner.wait_until_ns(start)
    assert runner.now_ns() >= later


@every_runner
def test_capacity_is_fixed_and_close_ends_it(make: Callable[[], ModelRunner]) -> None:
    runner = make()
    assert runner.capacity() == CONTEXT.capacity
    serve(runner)
    assert runner.capacity() == CONTEXT.capacity
    runner.close()


@every_runner
def test_a_token_comes_back_for_every_sequence_that_reached_its_end(make: Callable[[], ModelRunner]) -> None:
    """None where the runner has no model, else one for each sequence whose tokens are all computed."""
    known = {r.id: r.prompt_tokens for r in requests()}
    num_sampled = 0
    for plan, output in serve(make()):
        sampled = [s for s in plan.scheduled if s.context_len + s.num_new_tokens == known[s.request_id]]
        for sequence in sampled:
            known[sequence.request_id] += 1
        num_sampled += len(sampled)
        assert output.token_ids is None or len(output.token_ids) == len(sampled)
    assert num_sampled == sum(r.output_tokens for r in requests())


@every_runner
def test_what_is_observed_is_never_negative(make: Callable[[], ModelRunner]) -> None:
    for _, output in serve(make()):
        assert all(c is None or c >= 0 for c in output.counters)
