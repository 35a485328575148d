"""Scheduler: order, chunking, admission and preemption, on small pools with blocks of 4 tokens."""

from __future__ import annotations

import pytest

from tests.helpers import (
    Admission,
    Preemption,
    ScriptedRunner,
    drive,
    make_context,
    make_request,
    make_requests,
    make_scheduler,
    plans_of,
    step,
    submit,
)
from uvm_kv.kvcache.ops import MemoryOp, OpKind
from uvm_kv.sched.request import Request, Status
from uvm_kv.types import Allocation, Phase, Tier

SCHEMES = [("worst_case", "none"), ("optimistic", "recompute"), ("optimistic", "swap")]


def assert_served(requests: list[Request]) -> None:
    assert [r.status for r in requests] == [Status.FINISHED] * len(requests)
    assert [r.num_generated for r in requests] == [r.output_tokens for r in requests]


@pytest.mark.parametrize(("admission", "preemption"), SCHEMES)
def test_first_come_first_served_without_starvation(admission: Admission, preemption: Preemption) -> None:
    """One large request between small ones that would always fit: nobody overtakes it, and all are served."""
    context = make_context(8, 8)
    scheduler = make_scheduler(context, admission=admission, preemption=preemption, max_num_batched_tokens=16)
    requests = make_requests([(4, 8), (4, 8), (20, 8), *[(4, 4)] * 12])
    drive(scheduler, ScriptedRunner(context), requests)
    assert_served(requests)
    admitted = [r.admitted_ns for r in requests if r.admitted_ns is not None]
    assert admitted == sorted(admitted)


@pytest.mark.parametrize(("admission", "preemption"), SCHEMES)
@pytest.mark.parametrize("budget", [1, 2, 3, 5, 16])
def test_a_step_never_takes_more_than_the_token_budget(
    admission: Admission, preemption: Preemption, budget: int
) -> None:
    """Prompts and recomputed contexts are cut into chunks; the last one, and only it, yields a token."""
    context = make_context(8, 4)
    scheduler = make_scheduler(
        context, admission=admission, preemption=preemption, max_num_batched_tokens=budget, batch_size=budget
    )
    requests = make_requests([(9, 8), (4, 12), (10, 6), (5, 9)])
    plans = plans_of(drive(scheduler, ScriptedRunner(context), requests))
    sizes = [sum(s.num_new_tokens for s in plan.scheduled) for plan in plans]
    assert max(sizes) <= budget
    assert max(sizes) == budget or budget == 16
    assert_served(requests)
    prefilled = {s.request_id for plan in plans for s in plan.scheduled if s.phase is Phase.PREFILL}
    assert prefilled == {0, 1, 2, 3}


def test_decodes_come_before_the_prefill_of_later_requests() -> None:
    context = make_context(16)
    scheduler, runner = make_scheduler(context, max_num_batched_tokens=8), ScriptedRunner(context)
    submit(scheduler, runner, make_request(0, 4, 8))
    step(scheduler, runner)
    submit(scheduler, runner, make_request(1, 12, 2))
    plan = step(scheduler, runner)
    assert plan is not None
    assert [(s.request_id, s.phase, s.num_new_tokens) for s in plan.scheduled] == [
        (0, Phase.DECODE, 1),
        (1, Phase.PREFILL, 7),
    ]


def test_worst_case_admission_never_preempts() -> None:
    context = make_context(10)
    scheduler = make_scheduler(context, admission="worst_case")
    requests = make_requests([(4 + i % 5, 3 + i % 7) for i in range(40)])
    plans = plans_of(drive(scheduler, ScriptedRunner(context), requests))
    assert_served(requests)
    assert (scheduler.num_recomputed + scheduler.num_swapped_out) == 0
    assert not any(plan.dropped or plan.ops for plan in plans)
    assert sum(r.num_preemptions for r in requests) == 0


@pytest.mark.parametrize(("admission", "running"), [("worst_case", 2), ("optimistic", 4)])
def test_admission_decides_how_many_run(admission: Admission, running: int) -> None:
    """Requests of one prompt block and one output block on four blocks: two reserve all, four get their prompt in."""
    context = make_context(4)
    preemption: Preemption = "recompute" if admission == "optimistic" else "none"
    scheduler, runner = make_scheduler(context, admission=admission, preemption=preemption), ScriptedRunner(context)
    submit(scheduler, runner, *make_requests([(4, 4)] * 6))
    plan = step(scheduler, runner)
    assert plan is not None
    assert len(plan.scheduled) == running


def test_optimistic_admission_leaves_the_watermark_free_but_for_the_first() -> None:
    context = make_context(8)
    scheduler = make_scheduler(context, admission="optimistic", preemption="recompute", watermark=0.25)
    runner = ScriptedRunner(context)
    submit(scheduler, runner, *make_requests([(4, 2)] * 8))
    step(scheduler, runner)
    assert scheduler.kv.available(Tier.DEVICE) == 2
    alone = make_scheduler(context, admission="optimistic", preemption="recompute", watermark=0.25)
    submit(alone, ScriptedRunner(context), make_request(0, 31, 1))
    assert alone.schedule(0) is not None


def test_recompute_drops_the_latest_sequence_and_computes_it_again() -> None:
    """Two sequences on four blocks: as the first grows into its third block, the second gives its own up."""
    context = make_context(4)
    scheduler = make_scheduler(context, admission="optimistic", preemption="recompute")
    requests = make_requests([(8, 6), (7, 2)])
    requests[1].output_tokens = 6
    log = plans_of(drive(scheduler, ScriptedRunner(context), requests))
    assert_served(requests)
    assert (scheduler.num_recomputed, scheduler.num_swapped_out) == (1, 0)
    assert [r.num_preemptions for r in requests] == [0, 1]
    dropping = [plan for plan in log if plan.dropped]
    assert [plan.dropped for plan in dropping] == [(1,)]
    assert [s.request_id for s in dropping[0].scheduled] == [0]
    again = [s for plan in log[dropping[0].step + 1 :] for s in plan.scheduled if s.request_id == 1]
    assert (again[0].context_len, again[0].phase) == (0, Phase.PREFILL)
    assert again[0].num_new_tokens > 7
    assert len(again[0].new_blocks) == context.spec.num_blocks(again[0].num_new_tokens)


def test_swap_copies_the_table_out_and_the_whole_of_it_back() -> None:
    """The case above with a host tier: blocks 2 and 3 go out to 4 and 5, and come back after the first request has
    ended."""
    context = make_context(4, 4)
    scheduler = make_scheduler(context, admission="optimistic", preemption="swap")
    requests = make_requests([(8, 6), (7, 6)])
    plans = plans_of(drive(scheduler, ScriptedRunner(context), requests))
    assert_served(requests)
    assert (scheduler.num_recomputed, scheduler.num_swapped_out) == (0, 1)
    (out,) = [plan for plan in plans if plan.dropped]
    assert out.dropped == (1,)
    assert out.ops == (MemoryOp(OpKind.COPY_OUT, (2, 3), 0, 4, 0, (4, 5)),)
    assert [s.new_blocks for s in out.scheduled] == [(2,)]
    (back,) = [plan for plan in plans if plan.ops and plan is not out]
    (op,) = back.ops
    assert (op.kind, op.blocks, op.first_layer, op.last_layer) == (OpKind.COPY_IN, (4, 5), 0, 4)
    (resumed,) = [s for s in back.scheduled if s.request_id == 1]
    assert resumed.new_blocks[:2] == op.targets
    assert resumed.context_len > 0
    assert resumed.phase is Phase.DECODE
    assert len(resumed.new_blocks) == context.spec.num_blocks(resumed.context_len + 1)


def test_a_swap_that_finds_the_host_tier_full_is_counted_as_recompute() -> None:
    context = make_context(4, 1)
    scheduler = make_scheduler(context, admission="optimistic", preemption="swap")
    requests = make_requests([(8, 6), (7, 6)])
    plans = plans_of(drive(scheduler, ScriptedRunner(context), requests))
    assert_served(requests)
    assert (scheduler.num_recomputed, scheduler.num_swapped_out) == (1, 0)
    assert not any(plan.ops for plan in plans)


def test_swapped_sequences_come_back_before_anybody_is_admitted() -> None:
    context = make_context(8, 16)
    scheduler = make_scheduler(context, admission="optimistic", preemption="swap")
    requests = make_requests([(4, 16)] * 12)
    seen: list[int] = []
    for plan in plans_of(drive(scheduler, ScriptedRunner(context), requests)):
        new = [s.request_id for s in plan.scheduled if s.request_id not in seen]
        seen += new
        assert not (new and plan.dropped), "a step that preempts also admits"
    assert seen == list(range(12))
    assert scheduler.num_swapped_out > 0
    assert_served(requests)


def test_on_demand_growth_relocates_and_preempts() -> None:
    """Contiguous tables that grow: a run that is blocked moves on the device, and where it cannot, the latest goes."""
    context = make_context(12)
    scheduler = make_scheduler(context, admission="optimistic", preemption="recompute", allocation=Allocation.ON_DEMAND)
    requests = make_requests([(4, 9), (3, 10), (5, 14), (4, 6), (9, 4), (2, 20)])
    plans = plans_of(drive(scheduler, ScriptedRunner(context), requests))
    assert_served(requests)
    moves = [op for plan in plans for op in plan.ops]
    assert moves
    assert all(op.kind is OpKind.COPY_IN and len(op.blocks) == len(op.targets) for op in moves)
    assert scheduler.num_recomputed > 0


def test_a_lone_contiguous_sequence_that_reaches_the_end_of_the_pool_starts_over() -> None:
    """Scenario: the first sequence ends, the second lies behind it and grows to the last block. It can neither grow
    nor move, so it is recomputed at the front; it is alone, so the step after that must run it."""
    context = make_context(10)
    scheduler = make_scheduler(context, admission="optimistic", preemption="recompute", allocation=Allocation.ON_DEMAND)
    requests = make_requests([(16, 1), (4, 30)])
    drive(scheduler, ScriptedRunner(context), requests)
    assert_served(requests)
    assert scheduler.num_recomputed == 1


def test_reserve_max_takes_one_run_of_the_longest_request_at_once() -> None:
    context = make_context(11)
    scheduler, runner = (
        make_scheduler(context, allocation=Allocation.RESERVE_MAX, max_model_len=20),
        ScriptedRunner(context),
    )
    requests = make_requests([(4, 4), (6, 10), (3, 3)])
    submit(scheduler, runner, *requests)
    plan = step(scheduler, runner)
    assert plan is not None
    assert [s.new_blocks for s in plan.scheduled] == [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
    while scheduler.has_work():
        step(scheduler, runner)
    assert_served(requests)
    assert scheduler.num_recomputed == 0


@pytest.mark.parametrize(
    ("num_host", "placement", "allocation", "max_model_len", "lengths"),
    [
        pytest.param(0, "resident", "paged", 0, (16, 17), id="prompt plus output"),
        pytest.param(8, "resident", "paged", 0, (32, 1), id="a host tier that only serves swap"),
        pytest.param(8, "static_split", "paged", 0, (40, 25), id="both tiers"),
        pytest.param(0, "resident", "reserve_max", 40, (4, 4), id="the reservation"),
        pytest.param(0, "resident", "reserve_max", 16, (16, 4), id="longer than the reservation"),
        pytest.param(0, "resident", "orca_pow2", 16, (12, 5), id="longer than what is cut to the model's context"),
        pytest.param(0, "resident", "orca_pow2", 64, (16, 17), id="rounded up, over the budget"),
    ],
)
def test_a_request_that_can_never_fit_is_refused(
    num_host: int, placement: str, allocation: str, max_model_len: int, lengths: tuple[int, int]
) -> None:
    context = make_context(8, num_host)
    options = {"allocation": Allocation(allocation), "max_model_len": max_model_len}
    scheduler = make_scheduler(context, placement=placement, **options)
    with pytest.raises(ValueError, match="request 7"):
        scheduler.add(make_request(7, *lengths))
    assert not scheduler.has_work()


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_stop_token_ends_a_request_early(preemption: Preemption) -> None:
    """Request 0 stops at its third token, request 1 by its count; token ids survive preemption."""
    context = make_context(5, 4)
    scheduler = make_scheduler(context, admission="optimistic", preemption=preemption)
    runner = ScriptedRunner(context, token_of=lambda request_id, position: 100 * request_id + position)
    requests = [make_request(0, 8, 12, stop_token=10), make_request(1, 7, 12, stop_token=3), make_request(2, 4, 4)]
    drive(scheduler, runner, requests)
    assert [r.token_ids for r in requests] == [
        [8, 9, 10],
        [100 + i for i in range(7, 19)],
        [200 + i for i in range(4, 8)],
    ]
    assert [r.num_generated for r in requests] == [3, 12, 4]
    assert all(r.status is Status.FINISHED for r in requests)


@pytest.mark.parametrize(("admission", "preemption"), SCHEMES)
def test_tokens_are_conserved(admission: Admission, preemption: Preemption) -> None:
    """Tokens taken in are prompts, outputs but the last, and what was recomputed; tokens put out are the outputs."""
    context = make_context(9, 9)
    scheduler = make_scheduler(context, admission=admission, preemption=preemption, max_num_batched_tokens=12)
    runner = ScriptedRunner(context)
    requests = make_requests([(3 + i % 6, 1 + i % 9) for i in range(24)])
    submit(scheduler, runner, *requests)
    taken = put = lost = 0
    while scheduler.has_work():
        computed = {r.id: r.num_computed for r in scheduler.running}
        assert step(scheduler, runner) is not None
        lost += sum(computed.get(r.id, 0) for r in scheduler.waiting)
        taken, put = taken + scheduler.num_scheduled_tokens, put + scheduler.num_sampled
    assert put == sum(r.output_tokens for r in requests)
    assert taken == sum(r.max_tokens - 1 for r in requests) + lost
    assert scheduler.num_context_tokens == scheduler.num_swapped_tokens == 0
    assert scheduler.kv.available(Tier.DEVICE) == 9


def test_times_are_booked_where_they_happen() -> None:
    """Arrival at 0 with one slot: the second request is admitted, and first answered, after the first has ended."""
    context = make_context(8)
    scheduler = make_scheduler(context, batch_size=1)
    requests = make_requests([(4, 3), (4, 2)])
    drive(scheduler, ScriptedRunner(context, step_ns=10), requests)
    assert [(r.admitted_ns, r.first_token_ns, r.finish_ns) for r in requests] == [(0, 10, 30), (30, 40, 50)]
