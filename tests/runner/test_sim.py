"""SimRunner: bytes are those of the plan, the link never carries more than it can, and time is the roofline's."""

from __future__ import annotations

import pytest

from tests.helpers import Admission, Preemption, drive, make_context, make_requests, make_scheduler, make_sim
from uvm_kv.placement.base import PlacementContext
from uvm_kv.placement.registry import POLICIES
from uvm_kv.runner.sim.runner import Hints
from uvm_kv.sched.plan import StepOutput, StepPlan
from uvm_kv.types import CHUNK_BYTES, NS_PER_S, Layout, MemoryKind, Phase

SERVED = [(name, kind) for name, policy in POLICIES.items() for kind in sorted(policy.memory_kinds)]
LENGTHS = [(40 + 13 * i % 90, 30 + 17 * i % 80) for i in range(14)]


def run(
    context: PlacementContext, placement: str, *, preemption: Preemption = "none", hints: Hints | None = None
) -> list[tuple[StepPlan, StepOutput]]:
    admission: Admission = "worst_case" if preemption == "none" else "optimistic"
    scheduler = make_scheduler(
        context, placement=placement, max_num_batched_tokens=96, admission=admission, preemption=preemption
    )
    return drive(scheduler, make_sim(context, hints), make_requests(LENGTHS))


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
    carried = context.num_layers_ahead / context.spec.num_layers
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
    assert all(num_bytes % CHUNK_BYTES == 0 for num_bytes in column(log, "h2d_fault_bytes"))
    assert column(log, "d2h_eviction_bytes") == [c * CHUNK_BYTES for c in column(log, "evicted_chunks")]
    assert sum(column(log, "h2d_fault_bytes")) <= sum(column(log, "d2h_eviction_bytes"))


@pytest.mark.parametrize(
    ("hints", "named"),
    [
        (Hints(read_mostly=True), "hints.read_mostly"),
        (Hints(discard_on_free=True), "hints.discard_on_free"),
        (Hints(accessed_by=True), "hints.accessed_by"),
        (Hints(preferred_location="moon"), "hints.preferred_location=moon"),
    ],
)
def test_hints_that_are_not_modelled_are_refused(hints: Hints, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_sim(make_context(24, 24, memory=MemoryKind.MANAGED, block_size=16), hints)


def test_a_faster_link_never_slows_a_run() -> None:
    ends = [run(make_context(24, 40, block_size=16, link_gb_per_s=x), "static_split")[-1][1] for x in (1, 5, 25, 250)]
    times = [output.timing.end_ns for output in ends]
    assert times == sorted(times, reverse=True)
    assert times[0] > 2 * times[-1]
