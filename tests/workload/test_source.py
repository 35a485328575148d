"""Arrivals: open loop, Poisson, and a closed loop whose clients do not march in step."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers import ScriptedRunner, drive, make_context, make_request, make_scheduler, plans_of
from uvm_kv.sched.request import Status
from uvm_kv.types import NS_PER_S
from uvm_kv.workload.lengths import Lengths
from uvm_kv.workload.source import ClosedLoop, OpenLoop, all_at_once, poisson


def test_open_loop_hands_out_what_has_arrived_in_order() -> None:
    source = OpenLoop([make_request(i, arrival_ns=t) for i, t in enumerate((30, 10, 10, 20))])
    assert source.next_arrival_ns() == 10
    assert source.arrivals(9) == []
    assert [r.id for r in source.arrivals(20)] == [1, 2, 3]
    assert source.more_to_come()
    assert [r.id for r in source.arrivals(1_000)] == [0]
    assert (source.more_to_come(), source.next_arrival_ns()) == (False, None)


def test_all_at_once_is_at_zero() -> None:
    arrived = all_at_once([Lengths(3, 4), Lengths(5, 6)]).arrivals(0)
    assert [(r.id, r.prompt_tokens, r.output_tokens) for r in arrived] == [(0, 3, 4), (1, 5, 6)]


def test_poisson_arrivals_have_the_rate_and_the_seed() -> None:
    def times(seed: int) -> list[int]:
        source = poisson([Lengths(1, 1)] * 4_000, 20.0, np.random.default_rng(seed))
        return [r.arrival_ns for r in source.arrivals(10**18)]

    assert times(1) == times(1) != times(2)
    gaps = np.diff([0, *times(1)]) / NS_PER_S
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 20, rel=0.1)
    assert gaps.min() >= 0


@pytest.mark.parametrize("output_tokens", [1, 3, 8, 100])
def test_the_first_requests_of_a_closed_loop_are_staggered(output_tokens: int) -> None:
    """Client i's first request makes i / num_clients of its output, at least one token, and is not measured."""
    source = ClosedLoop([Lengths(7, output_tokens)] * 40, 8)
    first = source.arrivals(0)
    assert [r.output_tokens for r in first] == [max(1, output_tokens * i // 8) for i in range(8)]
    assert not any(r.measured for r in first)
    assert source.arrivals(10**18) == []
    assert source.more_to_come()
    source.finished(first[3], 500)
    assert source.next_arrival_ns() == 500
    assert source.arrivals(499) == []
    (second,) = source.arrivals(500)
    assert (second.id, second.arrival_ns, second.output_tokens, second.measured) == (8, 500, output_tokens, True)


@pytest.mark.parametrize("num_clients", [1, 3, 50])
def test_a_closed_loop_never_has_more_in_flight_than_clients(num_clients: int) -> None:
    """Every request that ends is replaced at once, until all lengths are used up."""
    lengths = [Lengths(3 + i % 5, 2 + i % 7) for i in range(30)]
    source = ClosedLoop(lengths, num_clients)
    context = make_context(400)
    scheduler = make_scheduler(context, batch_size=100, max_num_batched_tokens=1_000)
    plans = plans_of(drive(scheduler, ScriptedRunner(context), source))
    running = [len(plan.scheduled) for plan in plans]
    assert max(running) == min(num_clients, 30)
    assert {s.request_id for plan in plans for s in plan.scheduled} == set(range(30))
    until = next(i for i, plan in enumerate(plans) if plan.scheduled[-1].request_id == 29)
    assert all(n == min(num_clients, 30) for n in running[:until])
    assert not source.more_to_come()


def test_a_finished_request_does_not_wake_a_dry_source() -> None:
    source = ClosedLoop([Lengths(3, 4)], 4)
    (only,) = source.arrivals(0)
    only.status = Status.FINISHED
    source.finished(only, 10)
    assert (source.more_to_come(), source.next_arrival_ns()) == (False, None)


def test_a_closed_loop_that_preempts_goes_on() -> None:
    """The further lengths are used once, and only if a request that ended was preempted."""
    source = ClosedLoop([Lengths(3, 4)] * 3, 1, if_preempted=[Lengths(5, 6)] * 2)
    lengths = []
    for preempted in (False, True, True, True, True):
        (request,) = source.arrivals(0)
        lengths.append(request.prompt_tokens)
        request.num_preemptions = int(preempted)
        source.finished(request, 0)
    assert lengths == [3, 3, 3, 5, 5] and not source.more_to_come()
    calm = ClosedLoop([Lengths(3, 4)], 1, if_preempted=[Lengths(5, 6)])
    calm.finished(calm.arrivals(0)[0], 0)
    assert not calm.more_to_come()
