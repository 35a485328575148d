"""Managed memory that is prefetched ahead and evicted by plan: bytes by hand, time by hand, and what it cannot beat."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.helpers import drive, make_context, make_request, make_requests, make_scheduler, make_sim
from uvm_kv.kvcache.ops import MemoryOp, OpKind
from uvm_kv.placement.base import PlacementContext
from uvm_kv.runner.sim.managed import Hints
from uvm_kv.runner.sim.uvm.block import NOTHING
from uvm_kv.runner.sim.uvm.cost import prefetch_s
from uvm_kv.sched.plan import ScheduledSequence, StepOutput, StepPlan
from uvm_kv.types import CHUNK_BYTES, NS_PER_S, MemoryKind, Phase

BY_TIER = Hints(preferred_location="by_tier", accessed_by=True)
LENGTHS = [(40 + 13 * i % 90, 30 + 17 * i % 80) for i in range(14)]
Log = list[tuple[StepPlan, StepOutput]]


def managed(num_device: int = 16, num_host: int = 48, **options: float) -> PlacementContext:
    """Blocks of 16 tokens over 4 layers, 8 to a chunk: the device tier is as many chunks as there are half blocks."""
    return make_context(num_device, num_host, memory=MemoryKind.MANAGED, block_size=16, **options)  # type: ignore[arg-type]


def with_profile(context: PlacementContext, group: str, **changes: float) -> PlacementContext:
    roofline = context.roofline
    changed = replace(getattr(roofline.profile, group), **changes)
    profile = replace(roofline.profile, **{group: changed})
    return replace(context, roofline=type(roofline)(profile, roofline.model, 2))


def run(
    context: PlacementContext,
    lengths: list[tuple[int, int]] = LENGTHS,
    *,
    hints: Hints = BY_TIER,
    placement: str = "prefetch_ahead",
) -> Log:
    scheduler = make_scheduler(context, placement=placement, max_num_batched_tokens=96)
    on_managed = context.memory is MemoryKind.MANAGED
    return drive(scheduler, make_sim(context, hints if on_managed else None), make_requests(lengths))


def total(log: Log, name: str) -> int:
    return sum(getattr(output.counters, name) for _, output in log)


def seconds(log: Log) -> float:
    return log[-1][1].timing.end_ns / NS_PER_S


LONE = [(16 * 16, 64)]
"""20 blocks: 8 on the device (one group of chunks), and 12 on the host (two), with one layer ahead."""


@pytest.mark.parametrize("hints", [BY_TIER, Hints(), Hints(accessed_by=True), Hints(preferred_location="device")])
def test_every_decode_step_moves_the_host_chunks_in_and_out_once(hints: Hints) -> None:
    """Two host groups of four layers: 8 chunks each way, by prefetch and by plan; no fault, and nothing in place."""
    log = run(managed(), LONE, hints=hints)
    assert {b for plan, _ in log for s in plan.scheduled for b in s.new_blocks} == {*range(8), *range(16, 28)}
    decoding = [output.counters for plan, output in log if plan.scheduled[0].context_len > 16 * 19]
    assert len(decoding) > 10
    for counters in decoding:
        assert counters.h2d_prefetch_bytes == counters.d2h_planned_eviction_bytes == 8 * CHUNK_BYTES
        assert counters.h2d_remote_read_bytes == counters.d2h_remote_write_bytes == 0
        assert counters.h2d_fault_bytes == counters.h2d_copy_bytes == counters.gpu_fault_groups == 0
    assert total(log, "evicted_chunks") == total(log, "d2h_eviction_bytes") == 0


def test_first_prefetches_populate_and_move_nothing() -> None:
    """The first step's host group is new: its chunks are populated on the device, three layers of it are sent back,
    and layer 0 comes again for the next step. The fourth layer goes as that step begins."""
    log = run(managed(), LONE)
    (first, output), (_, second) = log[:2]
    assert [op.kind for op in first.ops] == [OpKind.EVICT, OpKind.PREFETCH, OpKind.PREFETCH]
    assert output.counters.h2d_prefetch_bytes == CHUNK_BYTES
    assert output.counters.d2h_planned_eviction_bytes == 3 * CHUNK_BYTES
    assert second.counters.d2h_planned_eviction_bytes == 4 * CHUNK_BYTES


@pytest.mark.parametrize("link_gb_per_s", [2.0, 25.0, 400.0])
def test_a_steady_step_is_hidden_work_or_the_link(link_gb_per_s: float) -> None:
    """A layer lasts as long as its work, HBM passes of both ways included, or as its prefetch and eviction."""
    context = managed(link_gb_per_s=link_gb_per_s)
    plan, output = run(context, LONE)[-1]
    profile, roofline = context.roofline.profile, context.roofline
    moved = NOTHING._replace(h2d_prefetch_pages=2 * 512, d2h_prefetch_pages=2 * 512)
    link_s = prefetch_s(moved, 2, 4, profile)
    num_tokens = plan.scheduled[0].context_len + 1
    work_s = roofline.dense_s(1) + roofline.decode_attention_s(num_tokens) + 4 * CHUNK_BYTES / roofline.hbm_bytes_per_s
    expected = 4 * max(work_s, link_s) + roofline.head_s(1, 1)
    assert (output.timing.end_ns - output.timing.start_ns) / NS_PER_S == pytest.approx(expected, rel=1e-5)
    assert output.counters.stall_ns == pytest.approx(4 * max(0.0, link_s - work_s) * NS_PER_S, rel=1e-5, abs=2)


@pytest.mark.parametrize("link_gb_per_s", [1.0, 5.0, 25.0, 250.0])
@pytest.mark.parametrize("lengths", [LENGTHS, LONE, [(60, 40)] * 9], ids=["mixed", "lone", "equal"])
def test_never_faster_than_copies_from_pinned_memory(link_gb_per_s: float, lengths: list[tuple[int, int]]) -> None:
    """The same link: what managed memory drops it must send back."""
    pinned = run(make_context(24, 40, block_size=16, link_gb_per_s=link_gb_per_s), lengths)
    assert total(pinned, "h2d_copy_bytes") > 0 or lengths == LONE
    assert seconds(run(managed(24, 40, link_gb_per_s=link_gb_per_s), lengths)) >= seconds(pinned)


def test_a_faster_link_and_cheaper_calls_never_slow_a_run() -> None:
    slow = managed(24, 40, link_gb_per_s=5.0)
    by_link = [seconds(run(managed(24, 40, link_gb_per_s=x))) for x in (1, 5, 25, 250)]
    assert by_link == sorted(by_link, reverse=True) and by_link[0] > 2 * by_link[-1]
    by_overlap = [seconds(run(with_profile(slow, "managed", prefetch_overlap=x))) for x in (0.0, 0.5, 1.0)]
    assert by_overlap == sorted(by_overlap, reverse=True) and by_overlap[0] > 1.1 * by_overlap[-1]
    by_call = [seconds(run(with_profile(slow, "link", prefetch_call_us=x))) for x in (2000.0, 100.0, 0.0)]
    assert by_call == sorted(by_call, reverse=True) and by_call[0] > by_call[-1]
    by_chunk = [seconds(run(with_profile(slow, "link", prefetch_chunk_us=x))) for x in (5000.0, 20.0, 0.0)]
    assert by_chunk == sorted(by_chunk, reverse=True) and by_chunk[0] > by_chunk[-1]


def test_every_byte_that_comes_leaves_again() -> None:
    """Requests come and go over both tiers: what was sent back is what came, and once more what was populated on the
    device. Nothing faults back in."""
    log = run(managed(24, 40))
    came, left = total(log, "h2d_prefetch_bytes"), total(log, "d2h_planned_eviction_bytes")
    groups = {b // 8 for plan, _ in log for op in plan.ops for b in op.blocks}
    assert came > 0
    assert 0 <= left - came <= 4 * len(groups) * CHUNK_BYTES
    assert total(log, "h2d_fault_bytes") == 0


def test_a_chunk_too_much_moves_once_by_tier_and_every_step_without_a_mapping() -> None:
    """Claims that grow on the host leave device chunks behind that nobody planned to evict. Mapped, they are read over
    the link from then on; else each comes back by a fault, and takes the chunk that is needed next."""
    mapped, unmapped = (run(managed(24, 40), hints=hints) for hints in (BY_TIER, Hints()))
    assert 0 < total(mapped, "evicted_chunks") <= 12
    assert total(mapped, "h2d_remote_read_bytes") > 0 == total(unmapped, "h2d_remote_read_bytes")
    assert total(unmapped, "evicted_chunks") > total(mapped, "evicted_chunks")
    assert total(unmapped, "h2d_fault_bytes") > 0


# ---- plans by hand


def decode(step: int, context_len: int, new_blocks: tuple[int, ...], ops: tuple[MemoryOp, ...]) -> StepPlan:
    phase = Phase.DECODE if context_len else Phase.PREFILL
    return StepPlan(step, (ScheduledSequence(0, phase, 1 if context_len else 384, context_len, new_blocks),), ops)


def test_what_is_not_prefetched_is_read_in_place_or_faults() -> None:
    """Three groups, one on the device. Of the two host groups only one is prefetched: by tier, the other is read over
    the link, by page; without hints it came with its first touch and stays, until the driver has no chunk left."""
    blocks = (*range(8), *range(16, 32))
    first = (MemoryOp(OpKind.PREFETCH, tuple(range(16, 24)), 0, 4, 4), MemoryOp(OpKind.EVICT, blocks[8:16], 0, 3, -1))
    out = MemoryOp(OpKind.EVICT, blocks[8:16], 3, 4, 3)
    steady = (out, first[1], MemoryOp(OpKind.PREFETCH, blocks[8:16], 0, 4, 0))
    for hints, in_place in ((BY_TIER, True), (Hints(), False)):
        sim = make_sim(managed(), hints)
        sim.add(make_request(0, 384, 64))
        sim.execute(decode(0, 0, blocks, first))
        for step in (1, 2, 3):
            counters = sim.execute(decode(step, 383 + step, (), steady)).counters
        assert counters.h2d_prefetch_bytes == counters.d2h_planned_eviction_bytes == 4 * CHUNK_BYTES
        read = counters.h2d_remote_read_bytes or 0
        # Pages of whole blocks, never more than all that was to be read.
        assert (0.9 * 8 * 16 * 4 * 16384 <= read <= 8 * 16 * 4 * 16384) if in_place else read == 0


def test_a_prefetch_for_the_very_next_layer_is_waited_for() -> None:
    """The same bytes, issued a layer ahead or as late as can be."""
    blocks = (*range(8), *range(16, 24))

    def stall_ns(lead: int) -> int:
        sim = make_sim(managed(), BY_TIER)
        sim.add(make_request(0, 256, 64))
        into = MemoryOp(OpKind.PREFETCH, blocks[8:], lead, 4 + lead, lead)
        back = (MemoryOp(OpKind.EVICT, blocks[8:], 3, 4, 3), MemoryOp(OpKind.EVICT, blocks[8:], 0, 3, -1))
        stalls = [sim.execute(decode(step, 255 + step if step else 0, () if step else blocks, (*back, into)))
                  .counters.stall_ns for step in range(6)]  # fmt: skip
        return stalls[-1] or 0

    profile = managed().roofline.profile
    one_way = NOTHING._replace(h2d_prefetch_pages=4 * 512)
    assert stall_ns(0) >= prefetch_s(one_way, 4, 4, profile) * NS_PER_S
    assert stall_ns(1) < stall_ns(0) / 2
