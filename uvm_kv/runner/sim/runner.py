"""SimRunner: carries plans out on a simulated GPU and advances virtual time.

Compute times come from `uvm_kv.hw.roofline`, what overlaps with what from `uvm_kv.hw.overlap`, managed memory from
`uvm_kv.runner.sim.managed`. Copies of an op are batched: one call per op and layer, at the full link rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from uvm_kv.hw.overlap import CopyQueue, LayerWork, duplex, run_layers
from uvm_kv.hw.roofline import Roofline
from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.kvcache.ops import NO_TRAFFIC, MemoryCounters, MemoryOp, OpKind
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.runner.base import ModelRunner
from uvm_kv.runner.sim.managed import ManagedMemory
from uvm_kv.sched.plan import StepOutput, StepPlan, StepTiming
from uvm_kv.sched.request import Request
from uvm_kv.types import CHUNK_BYTES, NS_PER_S, Layout, MemoryKind, Phase

DECODE = Phase.DECODE


@dataclass(frozen=True)
class Hints:
    """cudaMemAdvise on the managed KV slab (design, section 3)."""

    preferred_location: str = "none"
    accessed_by: bool = False
    read_mostly: bool = False
    discard_on_free: bool = False


class _Sequence:
    """What the device side knows of one request: its block table, and how many tokens it has."""

    __slots__ = ("blocks", "groups", "known_tokens", "num_host")

    def __init__(self, prompt_tokens: int) -> None:
        self.known_tokens = prompt_tokens
        self.forget()

    def forget(self) -> None:
        self.blocks: list[int] = []
        self.num_host = 0
        self.groups: dict[int, None] = {}


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
    evictions: tuple[MemoryOp, ...] = ()


class SimRunner(ModelRunner):
    def __init__(
        self,
        roofline: Roofline,
        spec: KVCacheSpec,
        capacity: KVCapacity,
        memory: MemoryKind,
        hints: Hints | None = None,
    ) -> None:
        self._roofline = roofline
        self._profile = roofline.profile
        self._spec = spec
        self._capacity = capacity
        self._now = 0
        self._sequences: dict[int, _Sequence] = {}
        self._num_host_blocks = 0
        """Blocks of all tables that the GPU reads over the link unless they are copied ahead."""
        self._queue = CopyQueue()
        self._ops: tuple[MemoryOp, ...] = ()
        self._traffic = _Traffic()
        self._first_remote = capacity.num_device_blocks
        self._managed: ManagedMemory | None = None
        hints = hints or Hints()
        if memory is MemoryKind.MANAGED:
            self._open_managed(hints)
        self._touched: tuple[int, ...] = ()
        self._all_resident = False
        self._tables_changed = False

    def _open_managed(self, hints: Hints) -> None:
        for name in ("read_mostly", "discard_on_free"):
            if getattr(hints, name):
                raise ValueError(f"hints.{name}=true is not modelled by runner=sim; leave it false")
        total = sum(self._capacity)
        device_chunks = self._spec.num_chunks(self._capacity.num_device_blocks)
        self._managed = ManagedMemory(self._spec.num_chunks(total), device_chunks)
        match hints.preferred_location:
            case "none" | "device":
                if hints.accessed_by:
                    raise ValueError(
                        "hints.accessed_by=true is modelled by runner=sim only with preferred_location host or by_tier"
                    )
                self._first_remote = total
            case "host":
                self._first_remote = 0
            case "by_tier":
                pass
            case other:
                raise ValueError(f"hints.preferred_location={other}; allowed are none, device, host, by_tier")
        self._remote_faults = not hints.accessed_by
        self._remote_groups: set[int] = set()
        per_layer = self._spec.layout is Layout.LAYER_MAJOR
        groups = -(-total // self._spec.pieces_per_chunk)
        self._layer_stride = groups * self._spec.chunks_per_piece if per_layer else 0

    # ---- the seam

    def capacity(self) -> KVCapacity:
        return self._capacity

    def add(self, request: Request) -> None:
        self._sequences[request.id] = _Sequence(request.prompt_tokens)

    def remove(self, request_id: int) -> None:
        sequence = self._sequences.pop(request_id)
        self._num_host_blocks -= sequence.num_host
        self._tables_changed = True

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
            self._num_host_blocks -= sequences[request_id].num_host
            sequences[request_id].forget()
            self._tables_changed = True
        num_tokens = num_rows = num_decodes = read_tokens = remote_tokens = written_tokens = 0
        prefill_s = 0.0
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
            if sequence.num_host:
                here = self._remote_tokens(sequence, context)
                written_tokens += self._remote_tokens(sequence, context + num_new) - here
                remote_tokens += here
                if phase is DECODE:
                    read_tokens -= here
        num_rows += num_decodes
        traffic = self._read_ops(plan.ops)
        copied_tokens = min(remote_tokens, traffic.copied_blocks * spec.block_size)
        in_place_tokens = remote_tokens - copied_tokens
        dense_s = roofline.dense_s(num_tokens)
        attention_s = prefill_s
        if num_decodes:
            attention_s += roofline.decode_attention_s(read_tokens + copied_tokens)
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
        fault_s = self._page(traffic, counters) if self._managed is not None else 0.0
        elapsed_s += before_s + layers_s + fault_s
        counters["stall_ns"] = round((before_s + waited_s + fault_s) * NS_PER_S)
        return self._finish(elapsed_s, MemoryCounters(**counters))

    def _finish(self, elapsed_s: float, counters: MemoryCounters) -> StepOutput:
        start = self._now
        self._now = start + round(elapsed_s * NS_PER_S)
        return StepOutput(StepTiming(start, self._now), counters)

    # ---- block tables

    def _append(self, sequence: _Sequence, new_blocks: tuple[int, ...]) -> None:
        sequence.blocks.extend(new_blocks)
        num_host = sum(block >= self._first_remote for block in new_blocks)
        sequence.num_host += num_host
        self._num_host_blocks += num_host
        if self._managed is not None:
            group = self._spec.pieces_per_chunk
            known = len(sequence.groups)
            sequence.groups.update(dict.fromkeys(block // group for block in new_blocks))
            self._tables_changed |= len(sequence.groups) > known

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
        evictions = []
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
            elif op.kind is OpKind.EVICT:
                evictions.append(op)
            else:
                raise ValueError(f"op {op.kind} is not modelled by runner=sim")
        if not copied and self._queue.copy_s:
            lead = self._traffic.lead
        self._ops = ops
        self._traffic = _Traffic(copied, lead, late, late_calls, swap_in, swap_out, swap_calls, moved, tuple(evictions))
        return self._traffic

    def _before_layers_s(self, traffic: _Traffic) -> float:
        """Swaps, relocations, and copies that come too late to overlap."""
        link = self._profile.link
        call_s = link.copy_call_us * 1e-6
        late_s = traffic.late_bytes / link.h2d_bytes_per_s + traffic.late_calls * call_s
        swap_s = duplex(
            traffic.swap_in_bytes / link.h2d_bytes_per_s,
            traffic.swap_out_bytes / link.d2h_bytes_per_s,
            link.duplex_h2d,
            link.duplex_d2h,
        )
        moved_s = 2 * traffic.moved_bytes / self._roofline.hbm_bytes_per_s
        return late_s + max(swap_s) + traffic.swap_calls * call_s + moved_s

    # ---- managed memory

    def _page(self, traffic: _Traffic, counters: dict[str, int]) -> float:
        """Fault what the step touches in, layer by layer, sequence by sequence; the time it takes."""
        assert self._managed is not None
        driver, link, spec = self._profile.managed, self._profile.link, self._spec
        num_layers, stride = spec.num_layers, self._layer_stride
        planned = np.zeros(num_layers, np.int64)
        evictions: dict[int, list[MemoryOp]] = {}
        for op in traffic.evictions:
            evictions.setdefault(max(0, op.first_layer - op.lead), []).append(op)
        if self._tables_changed:
            touched = tuple(dict.fromkeys(g for s in self._sequences.values() for g in s.groups))
            if touched != self._touched:
                self._touched, self._all_resident = touched, False
            self._tables_changed = False
        remote_from = -(-self._first_remote // spec.pieces_per_chunk)
        groups = np.array([g for g in self._touched if g < remote_from], np.int64)
        remote_faults = 0
        if self._remote_faults and len(groups) < len(self._touched):
            fresh = {g for g in self._touched if g >= remote_from} - self._remote_groups
            self._remote_groups |= fresh
            remote_faults = len(fresh) * (num_layers if stride else spec.chunks_per_piece)
        first = migrated = evicted = 0
        if len(groups) and not (self._all_resident and not evictions):
            pieces = self._chunks_of(groups)
            if stride and not evictions:
                # Layer after layer, and no chunk twice in a step: one pass over all layers.
                chunks = (np.arange(num_layers)[:, None] * stride + pieces[None, :]).ravel()
                result = self._managed.touch(chunks, np.array([len(chunks)]))
                first, migrated, evicted = (int(x.sum()) for x in result)
            else:
                for layer in range(num_layers):
                    for op in evictions.get(layer, ()):
                        planned[layer] += self._evict(op)
                    chunks = pieces + layer * stride if stride else self._chunks_of_layer(groups, layer)
                    result = self._managed.touch(chunks, np.array([len(chunks)]))
                    first, migrated, evicted = (
                        total + int(x[0]) for total, x in zip((first, migrated, evicted), result, strict=True)
                    )
            self._all_resident = not (first or migrated or evictions)
        num_planned = int(planned.sum())
        faults = first + migrated + remote_faults
        counters["gpu_fault_groups"] = faults * driver.services_per_chunk
        counters["evicted_chunks"] = evicted
        counters["h2d_fault_bytes"] = migrated * CHUNK_BYTES
        counters["d2h_eviction_bytes"] = evicted * CHUNK_BYTES
        counters["d2h_planned_eviction_bytes"] = num_planned * CHUNK_BYTES
        evict_s = CHUNK_BYTES / link.d2h_bytes_per_s
        prefetch_s = CHUNK_BYTES / (link.d2h_bytes_per_s * link.prefetch_share) + link.prefetch_chunk_us * 1e-6
        return (
            faults * driver.services_per_chunk * driver.fault_service_us * 1e-6
            + migrated * CHUNK_BYTES / link.h2d_bytes_per_s
            + evicted * (driver.evict_fixed_us * 1e-6 + evict_s)
            + num_planned * prefetch_s
            + len(traffic.evictions) * link.prefetch_call_us * 1e-6
        )

    def _chunks_of(self, groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """Chunks of groups in the first layer (layer_major), or in all layers (block_major), in address order."""
        per_piece = self._spec.chunks_per_piece
        if per_piece == 1:
            return groups
        return (groups[:, None] * per_piece + np.arange(per_piece)[None, :]).ravel()

    def _chunks_of_layer(self, groups: NDArray[np.int64], layer: int) -> NDArray[np.int64]:
        """block_major: the chunks of each block that hold the layer."""
        spec = self._spec
        if spec.chunks_per_piece == 1:
            return groups
        start = layer * spec.layer_block_bytes // CHUNK_BYTES
        stop = -(-(layer + 1) * spec.layer_block_bytes // CHUNK_BYTES)
        return (groups[:, None] * spec.chunks_per_piece + np.arange(start, stop)[None, :]).ravel()

    def _evict(self, op: MemoryOp) -> int:
        assert self._managed is not None
        groups = np.unique(np.array(op.blocks, np.int64) // self._spec.pieces_per_chunk)
        chunks = self._chunks_of(groups)
        if self._layer_stride:
            chunks = (np.arange(op.first_layer, op.last_layer)[:, None] * self._layer_stride + chunks).ravel()
        return self._managed.evict(chunks)
