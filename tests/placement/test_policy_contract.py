"""What every placement policy promises. A new policy inherits this suite by registering in POLICIES."""

from __future__ import annotations

import copy
import inspect
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import Admission, Preemption, drive, make_context, make_requests, make_scheduler, make_sim, plans_of
from uvm_kv.kvcache.ops import OpKind
from uvm_kv.placement.base import PlacementContext, PlacementPolicy, PlacementView
from uvm_kv.placement.registry import POLICIES, build_policy, check_served
from uvm_kv.sched.plan import StepPlan
from uvm_kv.sched.request import Status
from uvm_kv.types import MemoryKind, Reach

SERVED = [(name, kind) for name, policy in POLICIES.items() for kind in sorted(policy.memory_kinds)]
EXPLICIT_COPIES = {OpKind.COPY_IN, OpKind.COPY_OUT}
DRIVER_MOVES = {OpKind.PREFETCH, OpKind.EVICT, OpKind.ADVISE, OpKind.DISCARD}
FORBIDDEN = {
    MemoryKind.MANAGED: EXPLICIT_COPIES,
    MemoryKind.PINNED: DRIVER_MOVES,
    MemoryKind.VMM: DRIVER_MOVES,
    MemoryKind.DEVICE: EXPLICIT_COPIES | DRIVER_MOVES,
}
NUM_DEVICE, NUM_HOST = 24, 40

every_policy = pytest.mark.parametrize(("name", "memory"), SERVED)


def context_of(memory: MemoryKind, num_device: int = NUM_DEVICE, num_host: int = NUM_HOST) -> PlacementContext:
    """Blocks of 16 tokens are 256 KiB a layer, eight to a chunk."""
    return make_context(num_device, 0 if memory is MemoryKind.DEVICE else num_host, memory=memory, block_size=16)


@st.composite
def views(draw: st.DrawFn, num_host: int) -> PlacementView:
    """Tables over both tiers, with claims at least as large."""
    tables: list[list[int]] = []
    device, host = 0, NUM_DEVICE
    for on_device, on_host in draw(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=5)):
        on_device, on_host = min(on_device, NUM_DEVICE - device), min(on_host, NUM_DEVICE + num_host - host)
        tables.append([*range(device, device + on_device), *range(host, host + on_host)])
        device, host = device + on_device, host + on_host
    claimed_device = draw(st.integers(device, NUM_DEVICE))
    claimed_host = draw(st.integers(host - NUM_DEVICE, num_host))
    tables = [table for table in tables if table]
    blocks = sum(map(len, tables))
    return PlacementView(
        NUM_DEVICE - claimed_device,
        num_host - claimed_host,
        claimed_device,
        claimed_host,
        len(tables),
        draw(st.integers(0, 20)),
        draw(st.integers(len(tables), max(len(tables), blocks * 16))),
        tuple(b for table in tables for b in table if b >= NUM_DEVICE),
        tuple(tables),
    )


@every_policy
def test_place_promises_what_there_is_and_plan_names_what_exists(name: str, memory: MemoryKind) -> None:
    """For random sequences of views, `place` gives exactly num_blocks within what is available, or None. The view stays
    unchanged, and a second instance that is shown the same views gives the same answers."""
    context = context_of(memory)
    num_layers, num_host = context.spec.num_layers, context.capacity.num_host_blocks

    @settings(max_examples=60)
    @given(shown=st.lists(st.tuples(views(num_host), st.integers(1, 30), st.booleans()), min_size=1, max_size=6))
    def check(shown: list[tuple[PlacementView, int, bool]]) -> None:
        policy, twin = build_policy(name, context), build_policy(name, context)
        for view, num_blocks, admitting in shown:
            before = copy.deepcopy(view)
            share = policy.place(view, num_blocks, admitting=admitting)
            assert share == twin.place(copy.deepcopy(view), num_blocks, admitting=admitting)
            if share is not None:
                assert sum(share) == num_blocks
                assert 0 <= share.device <= view.available_device
                assert 0 <= share.host <= (view.available_host if policy.uses_host else 0)
            ops = policy.plan(view)
            assert ops == twin.plan(view)
            assert view == before
            for op in ops:
                assert op.kind not in FORBIDDEN[memory]
                assert op.blocks
                assert all(0 <= b < NUM_DEVICE + num_host for b in op.blocks)
                assert len(set(op.blocks)) == len(op.blocks)
                assert 0 <= op.first_layer < op.last_layer <= num_layers + max(0, op.lead)
                if op.kind is OpKind.COPY_IN and not op.targets:
                    assert set(op.blocks) <= set(view.host_blocks)

    check()


@every_policy
@pytest.mark.parametrize("admission", ["worst_case", "optimistic"])
def test_every_admitted_workload_drains(name: str, memory: MemoryKind, admission: Admission) -> None:
    """Requests of many lengths, among them one that needs most of both tiers, through scheduler and simulator."""
    context = context_of(memory)
    limit = NUM_DEVICE + (NUM_HOST // 4 if POLICIES[name].uses_host else 0)
    scheduler = make_scheduler(
        context,
        placement=name,
        max_num_batched_tokens=128,
        admission=admission,
        preemption="none" if admission == "worst_case" else "recompute",
    )
    requests = make_requests(
        [*[(40 + 30 * i, 20 + 17 * i) for i in range(5)], (16 * limit - 48, 48), (16, 90), (100, 40)]
    )
    log = drive(scheduler, make_sim(context), requests)
    assert all(r.status is Status.FINISHED and r.num_generated == r.output_tokens for r in requests)
    kinds = {op.kind for plan, _ in log for op in plan.ops}
    assert not kinds & FORBIDDEN[memory]


@every_policy
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_what_is_not_refused_can_run_alone(name: str, memory: MemoryKind, share: float) -> None:
    """A request is refused when it is added, or it runs; nothing is accepted that no step can ever serve."""
    context = context_of(memory, num_device=16, num_host=64)
    scheduler = make_scheduler(context, placement=name, max_num_batched_tokens=512)
    num_tokens = int(sum(context.capacity) * share) * context.spec.block_size
    (request,) = make_requests([(num_tokens - 4, 4)])
    try:
        scheduler.add(request)
    except ValueError:
        assert not scheduler.has_work()
        return
    scheduler.waiting.clear()
    drive(scheduler, make_sim(context), [request])
    assert request.status is Status.FINISHED


@pytest.mark.parametrize("num_others", [1, 4])
@pytest.mark.parametrize("link_gb_per_s", [25.0, 0.1])
@pytest.mark.parametrize("admission", ["worst_case", "optimistic"])
@pytest.mark.parametrize(("name", "memory"), [pair for pair in SERVED if POLICIES[pair[0]].uses_host])
def test_a_lone_sequence_may_outgrow_the_device(
    name: str, memory: MemoryKind, admission: Admission, link_gb_per_s: float, num_others: int
) -> None:
    """A prompt that fits the device tier exactly, and an output that does not, beside short requests: slow
    beats never, whatever the link."""
    context = make_context(16, 48, memory=memory, block_size=16, link_gb_per_s=link_gb_per_s)
    preemption: Preemption = "none" if admission == "worst_case" else "recompute"
    scheduler = make_scheduler(
        context, placement=name, max_num_batched_tokens=512, admission=admission, preemption=preemption
    )
    requests = make_requests([(16 * 16, 64), *[(16, 16)] * num_others])
    drive(scheduler, make_sim(context), requests)
    assert all(r.status is Status.FINISHED for r in requests)
    assert requests[0].num_preemptions <= 1


@every_policy
def test_equal_runs_give_equal_plans(name: str, memory: MemoryKind) -> None:
    def run() -> list[StepPlan]:
        context = context_of(memory)
        scheduler = make_scheduler(context, placement=name, max_num_batched_tokens=96)
        return plans_of(drive(scheduler, make_sim(context), make_requests([(50, 40)] * 12)))

    assert run() == run()


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_sees_only_the_view(name: str) -> None:
    """The methods take the view and counts: no clock, no counters, no trace."""
    cls = POLICIES[name]
    assert cls.__mro__[1] is PlacementPolicy
    assert cls.reach is not PlacementPolicy.reach
    for method, extra in (("place", {"num_blocks", "admitting"}), ("plan", set())):
        parameters = set(inspect.signature(getattr(cls, method)).parameters)
        assert parameters == {"self", "view"} | extra
        hints = typing.get_type_hints(getattr(cls, method))
        assert hints["view"] is PlacementView
    assert list(inspect.signature(cls).parameters) == ["context"]


def test_the_view_holds_neither_time_nor_future() -> None:
    assert set(PlacementView._fields) == {
        "available_device",
        "available_host",
        "claimed_device",
        "claimed_host",
        "num_running",
        "num_waiting",
        "num_context_tokens",
        "host_blocks",
        "tables",
    }


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("memory", MemoryKind)
def test_memory_that_cannot_serve_a_placement_is_refused(name: str, memory: MemoryKind) -> None:
    if memory in POLICIES[name].memory_kinds:
        check_served(name, memory)
        return
    with pytest.raises(ValueError, match=f"placement={name} cannot be served by memory={memory}"):
        check_served(name, memory)


@pytest.mark.parametrize("lead", [0, 3, 9])
def test_a_lead_that_leaves_no_layer_to_copy_behind_is_refused(lead: int) -> None:
    context = make_context(8, 8, num_layers_ahead=lead)
    with pytest.raises(ValueError, match="takes 1 to 2"):
        build_policy("prefetch_ahead", context)


def test_ceilings_go_with_the_reach() -> None:
    context = context_of(MemoryKind.PINNED)
    reaches = {
        "resident": None,
        "static_split": Reach.IN_PLACE,
        "prefetch_ahead": Reach.COPY_AHEAD,
        "bandwidth_balanced": Reach.BOTH,
    }
    assert {name: build_policy(name, context).reach for name in reaches} == reaches
