"""SimRunner: carries plans out on a simulated GPU and advances virtual time.

Compute times come from `uvm_kv.hw.roofline`, what overlaps with what from `uvm_kv.hw.overlap`, managed memory from
`uvm_kv.runner.sim.managed`. Copies of an op are batched: one call per op and layer, at the full link rate.
"""

from __future__ import annotations

from typing import NamedTuple

from uvm_kv.hw.overlap import CopyQueue, LayerWork, duplex, run_layers
from uvm_kv.hw.roofline import Roofline
from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.kvcache.ops import NO_TRAFFIC, MemoryCounters, MemoryOp, OpKind
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.runner.base import ModelRunner
from uvm_kv.runner.sim.managed import Groups, ManagedKV, Paged, by_page
from uvm_kv.runner.sim.uvm.block import PAGE_BYTES, Rules
from uvm_kv.sched.plan import StepOutput, StepPlan, StepTiming
from uvm_kv.sched.request import Request
from uvm_kv.types import NS_PER_S, Hints, Layout, MemoryKind, Phase, ceil_div

DECODE = Phase.DECODE


class _Sequence:
    """What the device side knows of one request: its block table, and how many tokens it has."""

    __slots__ = ("blocks", "groups", "known_tokens", "num_host")

    groups: Groups

    def __init__(self, prompt_tokens: int) -> None:
        self.known_tokens = prompt_tokens
        self.forget()

    def forget(self) -> None:
        self.blocks: list[int] = []
        self.num_host = 0
        self.groups = {}


class _Traffic(NamedTuple):
    """The ops of a plan, in bytes."""

    copied_blocks: int = 0
    """Host blocks that are copied ahead for every layer."""
    lead: int = 0
    late_bytes: int = 0
    """Copies that a layer needs before they could be issued ahead of it."""
    late_calls: int = 0
    swap_in_bytes: int = 0
    swap_out_bytes: int = 0
    swap_calls: int = 0
    moved_bytes: int = 0
    """Relocated within the device."""
    managed_moves: tuple[MemoryOp, ...] = ()
    """Prefetches and evictions of managed memory."""
    by_page: bool = False
    """The driver model alone knows what lies on the host, because some of it is prefetched."""


class SimRunner(ModelRunner):
    def __init__(
        self,
        roofline: Roofline,
        spec: KVCacheSpec,
        capacity: KVCapacity,
        memory: MemoryKind,
        hints: Hints | None = None,
        driver: Rules | None = None,
        managed_device_bytes: int | None = None,
        pageable: bool = False,
    ) -> None:
        """`pageable`: the host tier is not pinned, so swaps are staged. `managed_device_bytes`: what managed memory
        can get of the card; by default just its tier."""
        self._roofline = roofline
        self._profile = roofline.profile
        self._spec = spec
        self._staging_share = roofline.profile.link.pageable_share if pageable else 1.0
        self._capacity = capacity
        self._now = 0
        self._sequences: dict[int, _Sequence] = {}
        self._queue = CopyQueue()
        self._ops: tuple[MemoryOp, ...] = ()
        self._traffic = _Traffic()
        self._first_remote = capacity.num_device_blocks
        self._managed: ManagedKV | None = None
        if memory is MemoryKind.MANAGED:
            self._managed = ManagedKV(
                spec, capacity, hints or Hints(), driver or Rules(), roofline.profile, managed_device_bytes
            )
            self._first_remote = self._managed.first_remote
        self._version = 0
        """Version of the block tables, raised when they change."""

    # ---- the seam

    def capacity(self) -> KVCapacity:
        return self._capacity

    def add(self, request: Request) -> None:
        self._sequences[request.id] = _Sequence(request.prompt_tokens)

    def remove(self, request_id: int) -> None:
        self._give_up(self._sequences.pop(request_id))

    def now_ns(self) -> int:
        return self._now

    def wait_until_ns(self, time_ns: int) -> None:
        if time_ns > self._now:
            idle = (time_ns - self._now) / NS_PER_S
            self._queue.done_s = min(self._queue.copy_s * self._traffic.lead, self._queue.done_s + idle)
            self._now = time_ns

    def close(self) -> None:
        self._sequences.clear()

    def execute(self, plan: StepPlan) -> StepOutput:
        sequences, spec, roofline = self._sequences, self._spec, self._roofline
        for request_id in plan.dropped:
            self._give_up(sequences[request_id])
            sequences[request_id].forget()
        num_tokens = num_rows = num_decodes = read_tokens = remote_tokens = decode_remote_tokens = written_tokens = 0
        prefill_s = 0.0
        traffic = self._read_ops(plan.ops)
        for request_id, phase, num_new, context, new_blocks in plan.scheduled:
            sequence = sequences[request_id]
            if new_blocks:
                self._append(sequence, new_blocks)
            num_tokens += num_new
            if phase is DECODE:
                num_decodes += 1
                read_tokens += context + 1
                sequence.known_tokens = context + 2
            else:
                prefill_s += roofline.prefill_attention_s(num_new, context)
                if context + num_new == sequence.known_tokens:
                    num_rows += 1
                    sequence.known_tokens += 1
            if sequence.num_host and not traffic.by_page:
                here = self._remote_tokens(sequence, context)
                written_tokens += self._remote_tokens(sequence, context + num_new) - here
                remote_tokens += here
                if phase is DECODE:
                    read_tokens -= here
                    decode_remote_tokens += here
        num_rows += num_decodes
        paged = self._page(plan, traffic) if self._managed is not None else Paged()
        if paged.faults.remote_read_pages:
            # Whole pages of whole blocks, so perhaps a little more than was to be read.
            here = min(read_tokens, paged.faults.remote_read_pages * PAGE_BYTES // spec.token_bytes)
            remote_tokens += here
            read_tokens -= here
        copied_tokens = min(remote_tokens, traffic.copied_blocks * spec.block_size)
        in_place_tokens = remote_tokens - copied_tokens
        dense_s = roofline.dense_s(num_tokens)
        attention_s = prefill_s
        if num_decodes:
            # What prefill chunks read of copies is in prefill_s.
            attention_s += roofline.decode_attention_s(read_tokens + min(copied_tokens, decode_remote_tokens))
        elapsed_s = roofline.head_s(num_tokens, num_rows)
        if (
            self._managed is None
            and not remote_tokens
            and not written_tokens
            and not plan.ops
            and not self._queue.copy_s
        ):
            elapsed_s += spec.num_layers * (dense_s + attention_s)
            return self._finish(elapsed_s, NO_TRAFFIC)

        link, token_bytes = self._profile.link, spec.layer_token_bytes
        in_place_bytes = in_place_tokens * spec.token_bytes
        work = LayerWork(dense_s, attention_s)
        if in_place_tokens:
            work.in_place_s = in_place_tokens * token_bytes / link.zero_copy_bytes_per_s(in_place_bytes)
        if written_tokens:
            work.write_s = written_tokens * token_bytes / link.d2h_bytes_per_s
        if traffic.copied_blocks:
            layer_bytes = traffic.copied_blocks * spec.layer_block_bytes
            work.copy_s = layer_bytes / link.h2d_bytes_per_s + link.copy_call_us * 1e-6
            work.copy_write_s = layer_bytes / roofline.hbm_bytes_per_s
        elif paged.ahead_s:  # What is evicted by plan is read from HBM, as what is prefetched is written there.
            work.copy_s = paged.ahead_s / spec.num_layers
            work.copy_write_s = paged.ahead_bytes / (spec.num_layers * roofline.hbm_bytes_per_s)
        if work.write_s:
            h2d_s = work.in_place_s + work.copy_s
            stretched, work.write_s = duplex(h2d_s, work.write_s, link.duplex_h2d, link.duplex_d2h)
            if h2d_s:
                work.in_place_s *= stretched / h2d_s
                work.copy_s *= stretched / h2d_s
        before_s = self._before_layers_s(traffic)
        layers_s, waited_s = run_layers(spec.num_layers, work, traffic.lead, self._queue)
        counters = {
            "h2d_copy_bytes": traffic.copied_blocks * spec.block_bytes + traffic.late_bytes + traffic.swap_in_bytes,
            "h2d_remote_read_bytes": in_place_bytes,
            "d2h_copy_bytes": traffic.swap_out_bytes,
            "d2h_remote_write_bytes": written_tokens * spec.token_bytes,
        }
        if self._managed is not None:
            counters |= _counters(paged)
        elapsed_s += before_s + layers_s + paged.seconds
        counters["stall_ns"] = round((before_s + waited_s + paged.seconds) * NS_PER_S)
        return self._finish(elapsed_s, MemoryCounters(**counters))

    def _finish(self, elapsed_s: float, counters: MemoryCounters) -> StepOutput:
        start = self._now
        self._now = start + round(elapsed_s * NS_PER_S)
        return StepOutput(StepTiming(start, self._now), counters)

    # ---- block tables

    def _append(self, sequence: _Sequence, new_blocks: tuple[int, ...]) -> None:
        sequence.blocks.extend(new_blocks)
        sequence.num_host += sum(block >= self._first_remote for block in new_blocks)
        if self._managed is not None:
            for block in new_blocks:
                group, bit = self._managed.group_of(block)
                sequence.groups[group] = sequence.groups.get(group, 0) | bit
            self._version += 1

    def _give_up(self, sequence: _Sequence) -> None:
        if self._managed is not None:
            self._managed.free(sequence.blocks)
            self._version += 1

    def _remote_tokens(self, sequence: _Sequence, num_tokens: int) -> int:
        """How many of the first `num_tokens` tokens lie in blocks that are read over the link."""
        size, blocks = self._spec.block_size, sequence.blocks
        filled, rest = divmod(num_tokens, size)
        if len(blocks) - filled <= 1:  # The usual case: the table ends with the block that the next token goes to.
            remote = sequence.num_host * size
            if len(blocks) > filled and blocks[filled] >= self._first_remote:
                remote -= size - rest
            return remote
        remote = sum(block >= self._first_remote for block in blocks[:filled]) * size
        return remote + (rest if blocks[filled] >= self._first_remote else 0)

    # ---- ops

    def _read_ops(self, ops: tuple[MemoryOp, ...]) -> _Traffic:
        if ops is self._ops:
            return self._traffic
        spec, device = self._spec, self._capacity.num_device_blocks
        copied = lead = late = late_calls = swap_in = swap_out = swap_calls = moved = 0
        managed_moves = []
        for op in ops:
            num_layers = op.last_layer - op.first_layer
            num_bytes = len(op.blocks) * num_layers * spec.layer_block_bytes
            calls = num_layers if spec.layout is Layout.LAYER_MAJOR else 1
            if op.kind is OpKind.COPY_IN and not op.targets:
                if num_layers == spec.num_layers:
                    copied, lead = len(op.blocks), op.lead
                else:
                    late, late_calls = late + num_bytes, late_calls + num_layers
            elif op.kind is OpKind.COPY_IN:
                if op.blocks[0] < device:
                    moved += num_bytes
                else:
                    swap_in, swap_calls = swap_in + num_bytes, swap_calls + calls
            elif op.kind is OpKind.COPY_OUT:
                swap_out, swap_calls = swap_out + num_bytes, swap_calls + calls
            elif op.kind in (OpKind.EVICT, OpKind.PREFETCH):
                managed_moves.append(op)
                if op.kind is OpKind.PREFETCH:
                    lead = op.lead
            else:
                raise ValueError(f"op {op.kind} is not modelled by runner=sim")
        if not lead and self._queue.copy_s:
            lead = self._traffic.lead
        self._ops = ops
        copies = (copied, lead, late, late_calls, swap_in, swap_out, swap_calls, moved)
        self._traffic = _Traffic(*copies, tuple(managed_moves), by_page(managed_moves))
        return self._traffic

    def _before_layers_s(self, traffic: _Traffic) -> float:
        """Swaps, relocations, and copies that come too late to overlap."""
        link = self._profile.link
        call_s = link.copy_call_us * 1e-6
        late_s = traffic.late_bytes / link.h2d_bytes_per_s + traffic.late_calls * call_s
        swap_s = duplex(
            traffic.swap_in_bytes / (link.h2d_bytes_per_s * self._staging_share),
            traffic.swap_out_bytes / (link.d2h_bytes_per_s * self._staging_share),
            link.duplex_h2d,
            link.duplex_d2h,
        )
        moved_s = 2 * traffic.moved_bytes / self._roofline.hbm_bytes_per_s
        return late_s + max(swap_s) + traffic.swap_calls * call_s + moved_s

    # ---- managed memory

    def _page(self, plan: StepPlan, traffic: _Traffic) -> Paged:
        assert self._managed is not None
        size = self._spec.block_size
        written: list[int] = []
        if self._managed.sees_writes:
            for request_id, _, num_new, context, _ in plan.scheduled:
                written += self._sequences[request_id].blocks[context // size : ceil_div(context + num_new, size)]
        if plan.step == 0:  # What holds KV before the first step was filled directly.
            self._managed.populate(self._sequences[s.request_id].groups for s in plan.scheduled if s.context_len)
        scheduled = [s.request_id for s in plan.scheduled]
        groups = (self._sequences[request_id].groups for request_id in scheduled)
        return self._managed.step((self._version, scheduled), groups, written, traffic.managed_moves)


def _counters(paged: Paged) -> dict[str, int]:
    faults, planned = paged.faults, paged.planned
    return {
        "gpu_fault_groups": faults.fault_groups,
        "evicted_chunks": faults.evicted_chunks + planned.evicted_chunks,
        "h2d_fault_bytes": faults.h2d_fault_pages * PAGE_BYTES,
        "h2d_prefetch_bytes": planned.h2d_prefetch_pages * PAGE_BYTES,
        "d2h_eviction_bytes": (faults.d2h_eviction_pages + planned.d2h_eviction_pages) * PAGE_BYTES,
        "d2h_planned_eviction_bytes": planned.d2h_prefetch_pages * PAGE_BYTES,
    }
