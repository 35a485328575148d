"""What single policies do: staging arithmetic, hiding, caps."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from tests.helpers import drive, make_context, make_requests, make_scheduler, make_sim, plans_of
from uvm_kv.kvcache.ops import MemoryOp, OpKind
from uvm_kv.placement.base import PlacementContext, PlacementView, Share
from uvm_kv.placement.registry import build_policy
from uvm_kv.sched.plan import StepPlan
from uvm_kv.types import Hints, Layout, MemoryKind, Reach


def view_of(
    context: PlacementContext,
    *,
    claimed_device: int = 0,
    claimed_host: int = 0,
    num_running: int = 1,
    num_waiting: int = 0,
    num_context_tokens: int = 0,
    host_blocks: tuple[int, ...] = (),
    tables: tuple[list[int], ...] | None = None,
) -> PlacementView:
    device, host = context.capacity
    return PlacementView(
        device - claimed_device,
        host - claimed_host,
        claimed_device,
        claimed_host,
        num_running,
        num_waiting,
        num_context_tokens,
        host_blocks,
        tables,
    )


def copies(first: int, last: int, *blocks: int) -> MemoryOp:
    return MemoryOp(OpKind.COPY_IN, blocks, first, last, 2)


STAGED = ["prefetch_ahead", "bandwidth_balanced"]


@pytest.mark.parametrize("name", STAGED)
def test_copies_run_ahead_across_the_step_boundary(name: str) -> None:
    """Eight layers, two ahead. A new block's first two layers are late once; then its copies come from the step
    before. A block that leaves is no longer copied, and no host block means no op."""
    context = make_context(64, 64, num_layers=8, num_layers_ahead=2, reach=Reach.COPY_AHEAD)
    policy = build_policy(name, context)
    one, two, three = (64,), (64, 65), (65, 66)
    shown = [((), ()), (one, (copies(0, 2, 64), copies(2, 10, 64))), (one, (copies(2, 10, 64),))]
    shown += [(one, (copies(2, 10, 64),)), (two, (copies(0, 2, 65), copies(2, 10, 64, 65)))]
    shown += [(two, (copies(2, 10, 64, 65),)), (three, (copies(0, 2, 66), copies(2, 10, 65, 66)))]
    shown += [((66,), (copies(2, 10, 66),)), ((), ()), (one, (copies(0, 2, 64), copies(2, 10, 64)))]
    for host_blocks, ops in shown:
        view = view_of(context, host_blocks=host_blocks, num_context_tokens=400, claimed_host=len(host_blocks))
        assert policy.plan(view) == ops


@pytest.mark.parametrize("name", STAGED)
def test_each_host_block_is_brought_in_once_a_step(name: str) -> None:
    """Scenario: decode for many steps over an unchanged set of host blocks. A late copy is made in the step that
    needs it, and never again."""
    context = make_context(40, 40, block_size=16, num_layers=8, reach=Reach.COPY_AHEAD)
    scheduler = make_scheduler(context, placement=name, max_num_batched_tokens=256)
    plans = plans_of(drive(scheduler, make_sim(context), make_requests([(100, 60)] * 6)))
    late = [(b, plan.step) for plan in plans for op in plan.ops if op.last_layer <= 1 for b in op.blocks]
    assert late
    steps = {b: [step for block, step in late if block == b] for b, _ in late}
    assert all(later - earlier > 1 for seen in steps.values() for earlier, later in pairwise(seen))


@pytest.mark.parametrize(("num_layers", "lead"), [(4, 1), (8, 2), (32, 2)])
@pytest.mark.parametrize("claimed_host", [0, 3, 20])
def test_staging_is_held_back_from_the_device(num_layers: int, lead: int, claimed_host: int) -> None:
    """lead + 1 layers of every copied block lie on the device at once: that much stays unclaimed there."""
    context = make_context(40, 40, num_layers=num_layers, num_layers_ahead=lead)
    policy = build_policy("prefetch_ahead", context)
    for num_blocks in range(1, 50):
        share = policy.place(view_of(context, claimed_host=claimed_host), num_blocks, admitting=True)
        if share is not None:
            staging = math.ceil((claimed_host + share.host) * (lead + 1) / num_layers)
            assert share.device + staging <= 40


def test_prefetch_ahead_needs_no_host_while_all_fits_the_device() -> None:
    context = make_context(40, 40)
    policy = build_policy("prefetch_ahead", context)
    assert policy.place(view_of(context), 40, admitting=True) == Share(40, 0)
    full = view_of(context, claimed_device=40)
    assert policy.place(full, 1, admitting=True) is None


@pytest.mark.parametrize("memory", [MemoryKind.PINNED, MemoryKind.VMM])
@pytest.mark.parametrize("reach", Reach)
def test_bandwidth_balanced_stops_using_the_host_where_the_link_is_slow(memory: MemoryKind, reach: Reach) -> None:
    """A nearly full device and a request of ten blocks, as long as those that run: placed on the host at 25 GB/s, and
    not at 0.1 GB/s."""
    on_host: dict[float, int] = {}
    for link_gb_per_s in (25.0, 0.1):
        context = make_context(400, 400, memory=memory, reach=reach, block_size=16, link_gb_per_s=link_gb_per_s)
        policy = build_policy("bandwidth_balanced", context)
        view = view_of(context, claimed_device=390, num_running=39, num_context_tokens=6_000, num_waiting=5)
        if reach is not Reach.COPY_AHEAD:  # What is read in place takes no staging, so the device is filled first.
            view = view._replace(claimed_device=400, available_device=0, num_running=40)
        share = policy.place(view, 10, admitting=True)
        on_host[link_gb_per_s] = share.host if share else 0
    assert on_host == {25.0: 10, 0.1: 0}


@pytest.mark.parametrize("reach", Reach)
def test_who_waits_takes_no_device_from_a_request_that_runs_alone(reach: Reach) -> None:
    """A request beyond the device, over a link that hides next to nothing: it is served alone, so nothing is staged
    for those that wait, and it lies as it does when nobody waits."""
    context = make_context(40, 400, reach=reach, num_layers=8, link_gb_per_s=0.1)
    policy = build_policy("bandwidth_balanced", context)
    alone = policy.place(view_of(context, num_running=0, num_waiting=1), 60, admitting=True)
    assert alone is not None and alone.device >= 20
    for num_waiting in (2, 4):
        assert policy.place(view_of(context, num_running=0, num_waiting=num_waiting), 60, admitting=True) == alone


def plans_under(reach: Reach) -> list[StepPlan]:
    context = make_context(74, 60, block_size=16, reach=reach, num_layers=8)
    scheduler = make_scheduler(context, placement="bandwidth_balanced", max_num_batched_tokens=512)
    log = drive(scheduler, make_sim(context), make_requests([(120, 120)] * 8))
    remote = sum(output.counters.h2d_remote_read_bytes or 0 for _, output in log)
    copied = sum(output.counters.h2d_copy_bytes or 0 for _, output in log)
    assert remote + copied > 0, "the host is not used"
    assert bool(remote) == (reach is not Reach.COPY_AHEAD)
    assert bool(copied) == (reach is not Reach.IN_PLACE)
    return plans_of(log)


def test_reach_in_place_issues_no_copies() -> None:
    assert not any(plan.ops for plan in plans_under(Reach.IN_PLACE))


def test_reach_copy_ahead_reads_nothing_in_place() -> None:
    assert any(plan.ops for plan in plans_under(Reach.COPY_AHEAD))


def test_reach_both_uses_both() -> None:
    """Attention hides part of the reads, and that part is not copied."""
    assert any(plan.ops for plan in plans_under(Reach.BOTH))


def run_capped(context: PlacementContext) -> tuple[int, int]:
    """Five sequences beyond the device tier: bytes evicted by plan, and chunks evicted by the driver."""
    scheduler = make_scheduler(context, placement="demand_capped", max_num_batched_tokens=512)
    block_size = context.spec.block_size
    log = drive(scheduler, make_sim(context), make_requests([(6 * block_size, 3 * block_size)] * 5))
    planned = sum(output.counters.d2h_planned_eviction_bytes or 0 for _, output in log)
    return planned, sum(output.counters.evicted_chunks or 0 for _, output in log)


@pytest.mark.parametrize(
    ("block_size", "num_device"),
    [
        pytest.param(16, 24, id="chunks of 8 blocks"),
        pytest.param(16, 40, id="just beyond the device"),
        pytest.param(20, 24, id="chunks of 6 blocks and a rest"),
    ],
)
def test_demand_capped_leaves_nothing_for_the_driver_to_evict(block_size: int, num_device: int) -> None:
    """What leaves is planned, so that the driver never has to choose."""
    context = make_context(num_device, 48, memory=MemoryKind.MANAGED, block_size=block_size)
    planned, driver = run_capped(context)
    assert planned > 0
    assert driver == 0


def test_demand_capped_over_block_major_is_refused_or_capped() -> None:
    """Every layer touches every block there, so no plan made before a layer can hold the set below itself."""
    context = make_context(16, 48, memory=MemoryKind.MANAGED, block_size=32, layout=Layout.BLOCK_MAJOR)
    try:
        build_policy("demand_capped", context)
    except ValueError:
        return
    assert run_capped(context)[1] == 0


@pytest.mark.parametrize(("device_groups", "num_groups"), [(3, 5), (3, 7), (3, 9), (7, 8), (7, 9), (7, 25)])
def test_demand_capped_keeps_at_most_its_cap_resident(device_groups: int, num_groups: int) -> None:
    """Layer-major chunks of 8 blocks over 4 layers. A naive device brings in what a layer touches and drops what the
    plan says before that layer: it never holds more than the device tier."""
    context = make_context(8 * device_groups, 300, memory=MemoryKind.MANAGED, block_size=16)
    policy = build_policy("demand_capped", context)
    table = list(range(num_groups * 8))
    resident: set[tuple[int, int]] = set()
    for _ in range(6):
        ops = policy.plan(view_of(context, tables=(table,)))
        assert ops
        for layer in range(4):
            for op in ops:
                for data_layer in range(op.first_layer, op.last_layer):
                    if max(0, data_layer - op.lead) == layer:
                        resident -= {(data_layer, b // 8) for b in op.blocks}
            resident |= {(layer, group) for group in range(num_groups)}
            assert len(resident) <= device_groups * 4


@pytest.mark.parametrize("block_size", [16, 12])
def test_placement_by_tier_never_makes_the_driver_evict(block_size: int) -> None:
    """Device-tier blocks of a managed range prefer the device and fit it, whatever their number is a multiple of;
    host-tier blocks are read in place. So nothing faults twice, and nothing is evicted."""
    context = make_context(21, 40, memory=MemoryKind.MANAGED, block_size=block_size)
    scheduler = make_scheduler(context, placement="static_split", max_num_batched_tokens=512)
    sim = make_sim(context, Hints(preferred_location="by_tier", accessed_by=True))
    log = drive(scheduler, sim, make_requests([(7 * block_size, 2 * block_size)] * 5))
    assert sum(output.counters.h2d_remote_read_bytes or 0 for _, output in log) > 0
    assert sum(output.counters.evicted_chunks or 0 for _, output in log) == 0
