"""SimRunner: bytes are those of the plan, the link never carries more than it can, and time is the roofline's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.helpers import Admission, Preemption, drive, make_context, make_requests, make_scheduler, make_sim
from uvm_kv.placement.base import PlacementContext
from uvm_kv.placement.registry import POLICIES
from uvm_kv.runner.sim.uvm.block import PAGE_BYTES
from uvm_kv.sched.plan import StepOutput, StepPlan
from uvm_kv.types import CHUNK_BYTES, NS_PER_S, Hints, Layout, MemoryKind, Phase

SERVED = [(name, kind) for name, policy in POLICIES.items() for kind in sorted(policy.memory_kinds)]
LENGTHS = [(40 + 13 * i % 90, 30 + 17 * i % 80) for i in range(14)]


def run(
    context: PlacementContext,
    placement: str,
    *,
    preemption: Preemption = "none",
    hints: Hints | None = None,
    lengths: list[tuple[int, int]] = LENGTHS,
) -> list[tuple[StepPlan, StepOutput]]:
    admission: Admission = "worst_case" if preemption == "none" else "optimistic"
    scheduler = make_scheduler(
        context, placement=placement, max_num_batched_tokens=96, admission=admission, preemption=preemption
    )
    return drive(scheduler, make_sim(context, hints), make_requests(lengths))


def column(log: list[tuple[StepPlan, StepOutput]], *names: str) -> list[int]:
    """Sums of counters, per step."""
    return [sum(getattr(output.counters, name) for name in names) for _, output in log]


H2D = ("h2d_copy_bytes", "h2d_fault_bytes", "h2d_prefetch_bytes", "h2d_remote_read_bytes")
D2H = ("d2h_copy_bytes", "d2h_eviction_bytes", "d2h_planned_eviction_bytes", "d2h_remote_write_bytes")
CASES = [*((name, memory, "none") for name, memory in SERVED), ("resident", MemoryKind.PINNED, "swap")]


@pytest.mark.parametrize("link_gb_per_s", [25.0, 1.0])
@pytest.mark.parametrize(("name", "memory", "preemption"), CASES)
def test_bytes_over_time_never_exceed_the_link(
    name: str, memory: MemoryKind, preemption: Preemption, link_gb_per_s: float
) -> None:
    """In each direction, from the start to any step. Copies issued near a step's end for the next one's first layers
    may be on their way: lead layers of what was copied, the only allowance."""
    num_host = 0 if memory is MemoryKind.DEVICE else 40
    context = make_context(24, num_host, memory=memory, block_size=16, link_gb_per_s=link_gb_per_s)
    log = run(context, name, preemption=preemption)
    per_ns = link_gb_per_s * 1e9 / NS_PER_S
    carried = context.options["num_layers_ahead"] / context.spec.num_layers
    for causes, ahead in ((H2D, carried), (D2H, 0.0)):
        total = 0
        copies = column(log, "h2d_copy_bytes")
        for (_, output), num_bytes, copied in zip(log, column(log, *causes), copies, strict=True):
            total += num_bytes
            assert total <= per_ns * output.timing.end_ns * (1 + 1e-9) + copied * ahead + 1


@pytest.mark.parametrize(("name", "memory", "preemption"), CASES)
def test_equal_runs_are_equal_to_the_nanosecond(name: str, memory: MemoryKind, preemption: Preemption) -> None:
    def once() -> list[tuple[StepPlan, StepOutput]]:
        num_host = 0 if memory is MemoryKind.DEVICE else 40
        return run(make_context(24, num_host, memory=memory, block_size=16), name, preemption=preemption)

    assert once() == once()


def test_a_decode_step_on_the_device_takes_what_the_roofline_says() -> None:
    context = make_context(80, memory=MemoryKind.DEVICE, block_size=16)
    for plan, output in run(context, "resident"):
        if any(s.phase is Phase.PREFILL for s in plan.scheduled):
            continue
        expected = context.roofline.decode_step_s(len(plan.scheduled), sum(s.context_len + 1 for s in plan.scheduled))
        assert output.timing.end_ns - output.timing.start_ns == pytest.approx(expected * NS_PER_S, abs=1)
        assert output.counters.stall_ns == 0


def test_reads_in_place_are_the_host_tokens_of_the_context() -> None:
    """Counted afresh from the plans: what lies in host blocks is read, and what is new there is written."""
    context = make_context(24, 40, block_size=16)
    log = run(context, "static_split")
    tables: dict[int, list[int]] = {}
    reads, writes = [], []
    for plan, _ in log:
        read = written = 0
        for s in plan.scheduled:
            table = tables.setdefault(s.request_id, [])
            table.extend(s.new_blocks)
            on_host = [table[i // 16] >= 24 for i in range(s.context_len + s.num_new_tokens)]
            read += sum(on_host[: s.context_len])
            written += sum(on_host[s.context_len :])
        reads.append(read * context.spec.token_bytes)
        writes.append(written * context.spec.token_bytes)
    assert column(log, "h2d_remote_read_bytes") == reads
    assert column(log, "d2h_remote_write_bytes") == writes
    assert sum(reads) > 0
    assert sum(column(log, "h2d_copy_bytes")) == 0


def test_a_swap_moves_its_blocks_once_each_way() -> None:
    context = make_context(24, 40, block_size=16)
    log = run(context, "resident", preemption="swap")
    out = sum(len(op.blocks) for plan, _ in log for op in plan.ops if op.kind == "copy_out")
    back = sum(len(op.blocks) for plan, _ in log for op in plan.ops if op.kind == "copy_in")
    assert out == back > 0
    assert sum(column(log, "d2h_copy_bytes")) == out * context.spec.block_bytes
    assert sum(column(log, "h2d_copy_bytes")) == back * context.spec.block_bytes
    swapping = [output.counters.stall_ns for plan, output in log if plan.ops]
    assert all(stall for stall in swapping)


@pytest.mark.parametrize("layout", Layout)
def test_demand_paging_moves_whole_chunks_and_only_beyond_capacity(layout: Layout) -> None:
    """First touches move nothing. Beyond the device, chunks come and go; what is evicted is what came back or left."""
    fits = make_context(400, 0, memory=MemoryKind.MANAGED, block_size=16, layout=layout)
    log = run(fits, "demand")
    assert sum(column(log, "gpu_fault_groups")) > 0
    assert sum(column(log, "h2d_fault_bytes", "d2h_eviction_bytes", "evicted_chunks")) == 0
    log = run(make_context(24, 40, memory=MemoryKind.MANAGED, block_size=16, layout=layout), "demand")
    assert sum(column(log, "h2d_fault_bytes")) > 0
    assert all(num_bytes % PAGE_BYTES == 0 for num_bytes in column(log, "h2d_fault_bytes"))
    for num_bytes, chunks in zip(column(log, "d2h_eviction_bytes"), column(log, "evicted_chunks"), strict=True):
        assert PAGE_BYTES * chunks <= num_bytes <= CHUNK_BYTES * chunks
    assert sum(column(log, "h2d_fault_bytes")) <= sum(column(log, "d2h_eviction_bytes"))


def managed_totals(hints: Hints, layout: Layout = Layout.LAYER_MAJOR) -> dict[str, int]:
    """Counters of a decode that needs 2.7 times the device tier."""
    context = make_context(24, 40, memory=MemoryKind.MANAGED, block_size=16, layout=layout)
    log = run(context, "demand", hints=hints)
    return {name: sum(getattr(output.counters, name) for _, output in log) for name in log[0][1].counters._fields} | {
        "end_ns": log[-1][1].timing.end_ns
    }


@pytest.mark.parametrize("layout", Layout)
def test_hints_do_what_they_are_named_for(layout: Layout) -> None:
    none = managed_totals(Hints(), layout)
    assert none["d2h_eviction_bytes"] and none["h2d_fault_bytes"] and not none["h2d_remote_read_bytes"]
    # KV is read far more often than written: read-duplicated, it need not be copied back.
    duplicated = managed_totals(Hints(read_mostly=True), layout)
    assert duplicated["d2h_eviction_bytes"] < none["d2h_eviction_bytes"] / 2
    assert duplicated["h2d_fault_bytes"] > 0
    # What was evicted is mapped over the link and stays there.
    remote = managed_totals(Hints(accessed_by=True), layout)
    assert remote["h2d_fault_bytes"] < none["h2d_fault_bytes"] / 4
    assert remote["h2d_remote_read_bytes"] > 0
    assert remote["end_ns"] < none["end_ns"]
    # Preferring the host, nothing comes to the device: its KV is read over the link, always.
    host = managed_totals(Hints("host", accessed_by=True), layout)
    assert host["evicted_chunks"] == host["h2d_fault_bytes"] == 0
    assert host["h2d_remote_read_bytes"] > remote["h2d_remote_read_bytes"]
    # Read-mostly goes before the preferred location: what is read is duplicated and not read in place.
    both = managed_totals(Hints("host", accessed_by=True, read_mostly=True), layout)
    assert both["h2d_remote_read_bytes"] == 0 and both["h2d_fault_bytes"] > 0
    # Preferring the device migrates like no hint, but populates a chunk at once.
    device = managed_totals(Hints("device"), layout)
    assert device["gpu_fault_groups"] < none["gpu_fault_groups"]
    assert device["evicted_chunks"] >= none["evicted_chunks"] / 2


def test_discarding_what_is_freed_saves_the_way_back() -> None:
    context = make_context(24, 40, memory=MemoryKind.MANAGED, block_size=16)
    lengths = [(64, 40)] * 30
    kept, discarded = (run(context, "demand", hints=Hints(discard_on_free=on), lengths=lengths) for on in (False, True))
    assert 0 < sum(column(discarded, "d2h_eviction_bytes")) < sum(column(kept, "d2h_eviction_bytes"))


def test_an_unknown_preferred_location_is_refused() -> None:
    with pytest.raises(ValueError, match="preferred_location=moon; allowed are none, device, host, by_tier"):
        make_sim(make_context(24, 24, memory=MemoryKind.MANAGED, block_size=16), Hints(preferred_location="moon"))


def test_a_faster_link_never_slows_a_run() -> None:
    ends = [run(make_context(24, 40, block_size=16, link_gb_per_s=x), "static_split")[-1][1] for x in (1, 5, 25, 250)]
    times = [output.timing.end_ns for output in ends]
    assert times == sorted(times, reverse=True)
    assert times[0] > 2 * times[-1]


@pytest.mark.parametrize(("layout", "scans"), [(Layout.LAYER_MAJOR, 1), (Layout.BLOCK_MAJOR, 4)])
def test_demand_paging_scans_the_set_once_a_step_or_once_a_layer(layout: Layout, scans: int) -> None:
    """Beyond capacity every scan misses on every chunk: one scan per step where chunks hold one layer, one per layer
    where they hold all four."""
    context = make_context(16, 64, memory=MemoryKind.MANAGED, block_size=16, layout=layout)
    # Eight sequences of 5 or 6 blocks, decoding within a block: nothing is touched for the first time.
    log = run(context, "demand", lengths=[(80, 16)] * 8)
    decoding = [
        (plan, output)
        for plan, output in log
        if len(plan.scheduled) == 8 and all(s.phase is Phase.DECODE and not s.new_blocks for s in plan.scheduled)
    ]
    assert len(decoding) > 4
    num_chunks = context.spec.num_chunks(8 * 6)
    for _, output in decoding[1:]:
        assert output.counters.evicted_chunks == scans * num_chunks
        assert output.counters.h2d_fault_bytes == output.counters.d2h_eviction_bytes
    # What moves is what is read: pages of the layer only, not the whole chunk.
    assert decoding[-1][1].counters.h2d_fault_bytes == pytest.approx(8 * 6 * context.spec.block_bytes, rel=0.35)


@pytest.mark.parametrize("placement", ["prefetch_ahead", "static_split"])
def test_decode_is_charged_for_its_own_context_alone(placement: str) -> None:
    """Prefill chunks over cached context on the host are in the same steps; what they read is theirs."""
    context = make_context(24, 72, block_size=16)
    charged: list[int] = []

    class Spy(type(context.roofline)):  # type: ignore[misc]
        def decode_attention_s(self, num_tokens: int) -> float:
            charged.append(num_tokens)
            return float(super().decode_attention_s(num_tokens))

    roofline = context.roofline
    sim = make_sim(replace(context, roofline=Spy(roofline.profile, roofline.model, 2)))
    scheduler = make_scheduler(context, placement=placement, max_num_batched_tokens=96)
    log = drive(scheduler, sim, make_requests([(300, 60), (90, 90), (310, 50), (70, 80), (280, 40)]))
    decoding = [[s for s in plan.scheduled if s.phase is Phase.DECODE] for plan, _ in log]
    own = [sum(s.context_len + 1 for s in decodes) for decodes in decoding if decodes]
    mixed = [plan for plan, _ in log if {s.phase for s in plan.scheduled} == set(Phase)]
    assert any(s.context_len for plan in mixed for s in plan.scheduled if s.phase is Phase.PREFILL)
    assert len(charged) == len(own)
    assert all(tokens <= most for tokens, most in zip(charged, own, strict=True))
