"""CudaKV: KV memory and attention on a GPU, of any memory kind, through the C++ extension.

Everything of the model runs on one compute stream. Memory ops run on two copy streams of their own: what is issued
before a layer waits for the work before it, and the layer that needs it waits for its event. Demand paging has no ops.

A staged copy (prefetch_ahead, bandwidth_balanced) goes to a ring with room for lead + 1 layers. The ring continues from
the last layer of a step to the first of the next; attention then finds the block there, under an id of its own. A block
that is not staged for every layer of a step is read in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.kvcache.ops import MemoryCounters, MemoryOp, OpKind
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.memory import (
    KVMemory,
    PagedAttention,
    PagedKV,
    Placed,
    Slab,
    TransferCounters,
    append_kv,
    copy_blocks,
    decode_workspace_bytes,
    device_place,
    discard,
    host_place,
    new_event,
    new_stream,
    new_workspace,
    plan_capacity,
    slab_layout,
    stream_handle,
    whole_pages,
)
from uvm_kv.memory.layout import slab_bytes
from uvm_kv.runner.torch.kv import Issued, KVBackend, SequenceRows, random_kv
from uvm_kv.runner.torch.ranges import mark
from uvm_kv.types import Hints, Layout, MemoryKind, ceil_div

NO_BLOCK = -1
"""In a block table: no block. Nothing reads it."""


class CudaKV(KVBackend):
    def __init__(
        self,
        spec: KVCacheSpec,
        capacity: KVCapacity,
        memory: MemoryKind,
        dtype: torch.dtype,
        *,
        num_q_heads: int,
        device: torch.device,
        hints: Hints | None = None,
        staged_layers: int = 0,
        waits_for_evictions: bool = False,
        poison_freed: bool = False,
        allow_oversubscription: bool = False,
    ) -> None:
        """`staged_layers`: layers of a host block that are staged at once (lead + 1), 0 where the policy stages none.
        `waits_for_evictions`: a layer does not begin before what is evicted ahead of it is gone, as on a full card.
        `poison_freed`: freed blocks become NaN, which tests want and no measurement."""
        self.device = device
        self._spec, self._kind, self._dtype, self._hints = spec, memory, dtype, hints or Hints()
        self._ordinal = ordinal = device.index or 0
        name = str(dtype).removeprefix("torch.")
        self._memory = KVMemory(memory, spec, *capacity, device=ordinal, allow_oversubscription=allow_oversubscription)
        self._num_blocks = sum(capacity)
        self._first_host = capacity.num_device_blocks if self._memory.host is not None else self._num_blocks
        # On the CPU the extension is a stand-in that takes host memory, and there is no stream of torch's to share.
        self._compute = torch.cuda.Stream(device) if device.type == "cuda" else new_stream()
        self._handle = stream_handle(self._compute)
        self._in, self._out = new_stream(device=ordinal), new_stream(device=ordinal)
        self._counters = TransferCounters(device=ordinal)
        self._seen: dict[str, int] = {}
        if memory is MemoryKind.MANAGED:
            self._memory.advise(self._hints, stream=self._in)
        self._staging = None
        if staged_layers and self._memory.host is not None:
            self._staging = _Staging(spec, capacity, staged_layers, ordinal)
        self._view = PagedKV.of(
            self._memory, spec, dtype=name, staging=None if self._staging is None else self._staging.placed
        )
        self._attention = PagedAttention(self._view, num_q_heads=num_q_heads)
        self._workspace: Slab | None = None
        self._tables, self._ids = (_Tables(device, self._compute, kind) for kind in (torch.int32, torch.int64))
        self._waits_for_evictions, self._poison_freed = waits_for_evictions, poison_freed
        self._arrivals: dict[int, list[Any]] = {}
        """Layer -> events it waits for; those of the next step's layers stay for it."""
        self._waits: list[tuple[Any, Any]] = []
        self._reads_host = False
        """Whether kernels of this step read KV over the link: how long they wait for it, nothing tells."""
        self._issued: Issued = {}

    # ---- whole blocks

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """The compute stream waits for all of it. Sources and targets are different blocks."""
        begun, first = self._timing_event(), self._first_host
        crossing: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        within: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        for a, b in zip(sources, targets, strict=True):
            by_target = within if (a < first) == (b < first) else crossing
            by_target[b >= first].append((a - first if a >= first else a, b - first if b >= first else b))
        tiers = {False: self._memory.device, True: self._memory.host}
        for to_host, label, stream in ((True, "d2h", self._out), (False, "h2d", self._in)):
            if pairs := crossing[to_host]:
                source, target = tiers[not to_host], tiers[to_host]
                assert source is not None and target is not None
                begun.wait(stream=stream.handle)
                self._counters.copy_blocks(label, source, target, pairs, stream=stream)
                self._event(stream).wait(stream=self._handle)
        for is_host, pairs in within.items():
            if pairs:
                placed = tiers[is_host]
                assert placed is not None
                copy_blocks(placed, placed, pairs, stream=self._compute)
        self._waits.append((begun, self._timing_event()))

    def poison(self, blocks: Sequence[int]) -> None:
        if not blocks:
            return
        for placed, indices in self._by_tier(blocks):
            parts = placed.layout.ranges(indices, layers=(0, self._spec.num_layers)).as_list()
            if self._poison_freed:
                for offset, num_bytes in parts:
                    placed.slab.fill(0xFF, offset=offset, num_bytes=num_bytes, stream=self._compute)
            if self._kind is MemoryKind.MANAGED and self._hints.discard_on_free and (pages := whole_pages(parts)):
                discard(placed.slab, pages, stream=self._compute)

    def acquire(self, blocks: Sequence[int]) -> None:
        """Slots that no token has reached are never read."""

    def _by_tier(self, blocks: Sequence[int]) -> list[tuple[Placed, list[int]]]:
        near = [b for b in blocks if b < self._first_host]
        far = [b - self._first_host for b in blocks if b >= self._first_host]
        tiers = [(self._memory.device, near), (self._memory.host, far)]
        return [(placed, indices) for placed, indices in tiers if placed is not None and indices]

    # ---- a step

    def fill(self, blocks: Sequence[int], num_tokens: int, generator: torch.Generator) -> None:
        rows = SequenceRows(0, num_tokens, 0, list(blocks), False)
        step = _lay_out([rows], self._spec.block_size, frozenset(), None)
        with self.scope():
            homes, seqs, positions = self._tables.send(step.homes, step.seqs, step.positions)
            where = {"seqs": seqs, "positions": positions, "block_table": homes, "stream": self._compute}
            for layer in range(self._spec.num_layers):
                key, value = random_kv(self._spec, num_tokens, generator, self._dtype)
                append_kv(self._view, layer, key, value, **where)
                self._compute.synchronize()

    def integers(self, *lists: Sequence[int], into: Tensor | None = None) -> list[Tensor]:
        return self._ids.send(*(np.array(values, np.int64) for values in lists), into=into)

    def scope(self) -> contextlib.AbstractContextManager[object]:
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        stream: contextlib.AbstractContextManager[object] = torch.cuda.stream(self._compute)
        return stream

    def begin_step(self, batch: Sequence[SequenceRows], issued: Issued) -> None:
        self._issued = issued
        staged = frozenset[int]()
        if self._staging is not None:
            staged = self._staging.begin_step(issued, self._spec.num_layers)
            self._view.set_staged_first(self._staging.place(0))
        step = _lay_out(batch, self._spec.block_size, staged, self._staging)
        homes, table, seqs, positions, again, rows = self._tables.send(
            step.homes, step.table, step.seqs, step.positions, step.seqs_again, step.rows
        )
        with self.scope():
            part = None if len(step.rows) == len(step.seqs) else rows.long()
        self._reads_host |= self._is_on_host(step.table)
        self._step = _Bound(
            homes, table, seqs, positions, again if step.writes_again else None, part, step.fresh, self._attention
        )
        if step.rows.size:
            self._attention.plan(
                query_lens=step.query_lens, context_lens=step.context_lens, block_table=step.table, stream=self._compute
            )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        self._issue(layer)
        self._await(layer)
        step = self._step
        query, key, value = _packed(query), _packed(key), _packed(value)
        new = {"positions": step.positions, "stream": self._compute}
        with mark("append"):
            append_kv(self._view, layer, key, value, seqs=step.seqs, block_table=step.homes, **new)
            if step.seqs_again is not None:
                append_kv(self._view, layer, key, value, seqs=step.seqs_again, block_table=step.table, **new)
        with mark("attention"):
            out = self._attend(layer, query, key, value, scaling)
        if self.device.type == "cpu":
            self._compute.synchronize()  # torch's tensors there know no stream: they go when they are forgotten.
        return out

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        step = self._step
        out = torch.empty_like(query)
        if step.rows is None:
            self._run(layer, query, out, scaling)
        elif len(step.rows):
            part = query.index_select(0, step.rows)
            result = torch.empty_like(part)
            self._run(layer, part, result, scaling)
            out.index_copy_(0, step.rows, result)
        for rows in step.fresh:
            out[rows] = _causal(query[rows], key[rows], value[rows], scaling)
        return out

    def _run(self, layer: int, query: Tensor, out: Tensor, scaling: float | None) -> None:
        step = self._step
        step.attention.run(layer, query, out, block_table=step.table, scale=scaling, stream=self._compute)
        if self.device.type == "cpu":
            self._compute.synchronize()  # The next operator does not wait for it by itself.

    # ---- decode over a padded batch, for graphs

    def reserve_decode(self, num_seqs: int, max_tokens: int) -> None:
        """One workspace for attention in all steps, eager or padded, that need no more than decode steps of so many
        sequences of up to `max_tokens`; others get one beside it. It never moves: only the first call counts."""
        if self._workspace is not None:
            return
        heads, dtype = self._attention.num_q_heads, self._view.dtype
        most = {"num_seqs": num_seqs, "max_tokens": max_tokens}
        num_bytes = decode_workspace_bytes(self._spec, dtype=dtype, num_q_heads=heads, **most)
        self._workspace = new_workspace(self._view, num_bytes, stream=self._compute)
        self._attention.close()
        self._attention = PagedAttention(self._view, num_q_heads=heads, workspace=self._workspace)

    def padded(self, num_seqs: int, max_tokens: int) -> PaddedBatch:
        """Buffers for decode steps of up to `num_seqs` sequences of up to `max_tokens`, which stay where they are."""
        heads = self._attention.num_q_heads
        return PaddedBatch(self._view, heads, num_seqs, max_tokens, self.device, workspace=self._workspace)

    def can_pad(self, batch: Sequence[SequenceRows], issued: Issued) -> bool:
        """Whether a step is decode alone, and no memory op is issued or awaited in it."""
        quiet = not issued and not self._arrivals and (self._staging is None or self._staging.is_empty)
        return quiet and all(sequence.is_decode and sequence.num_new == 1 for sequence in batch)

    def begin_padded(self, padded: PaddedBatch, batch: Sequence[SequenceRows]) -> None:
        """As begin_step. Rows behind the batch's are nobody's: nothing is written for them, and nothing attended."""
        self._issued = {}
        tables = padded.lay_out(batch, self._spec.block_size)
        self._tables.send(tables.homes, tables.seqs, tables.positions, into=padded.integers)
        padded.attention.plan(
            query_lens=tables.query_lens,
            context_lens=tables.context_lens,
            block_table=tables.homes,
            stream=self._compute,
        )
        self._reads_host |= self._is_on_host(tables.homes)
        homes, seqs, positions = padded.views
        self._step = _Bound(homes, homes, seqs, positions, None, None, [], padded.attention)

    def _is_on_host(self, table: npt.NDArray[np.int32]) -> bool:
        return bool(((table >= self._first_host) & (table < self._num_blocks)).any())

    def end_step(self) -> MemoryCounters:
        """Called when the step's tokens have been read, so that its events are over."""
        stall_ns = 0
        for begin, end in self._waits:
            end.synchronize()
            stall_ns += end.ns_since(begin)
        self._waits.clear()
        moved = self._moved()
        managed = self._kind is MemoryKind.MANAGED
        waits_unseen, self._reads_host = managed or self._reads_host, False
        return MemoryCounters(
            h2d_copy_bytes=moved.get("h2d", 0),
            h2d_fault_bytes=None if managed else 0,
            h2d_prefetch_bytes=moved.get("prefetch", 0),
            h2d_remote_read_bytes=None if self._memory.host is not None or managed else 0,
            d2h_copy_bytes=moved.get("d2h", 0),
            d2h_eviction_bytes=None if managed else 0,
            d2h_planned_eviction_bytes=moved.get("evict", 0),
            d2h_remote_write_bytes=None if self._memory.host is not None or managed else 0,
            gpu_fault_groups=None if managed else 0,
            evicted_chunks=None if managed else 0,
            stall_ns=None if waits_unseen else stall_ns,
        )

    def _moved(self) -> dict[str, int]:
        """Bytes by label since the last step, of transfers that have ended."""
        totals = {label: total.num_bytes for label, total in self._counters.totals(wait=False).items()}
        moved = {label: count - self._seen.get(label, 0) for label, count in totals.items()}
        self._seen = totals
        return moved

    def close(self) -> None:
        for stream in (self._compute, self._in, self._out):
            stream.synchronize()
        self._attention.close()
        if self._workspace is not None:
            self._workspace.close()
        if self._staging is not None:
            self._staging.placed.slab.close()
        self._memory.close()

    # ---- memory ops of a layer

    def _issue(self, layer: int) -> None:
        ops = self._issued.get(layer, ())
        if not ops:
            return
        begun = self._event(self._compute)
        for stream in (self._in, self._out):
            begun.wait(stream=stream.handle)
        for op, data_layer in ops:
            with mark("evict" if op.kind is OpKind.EVICT else "prefetch"):
                self._issue_one(layer, op, data_layer)

    def _issue_one(self, layer: int, op: MemoryOp, data_layer: int) -> None:
        """Issue the part of an op that moves the data of one layer; a layer >= num_layers is one of the next step."""
        at = data_layer % self._spec.num_layers
        if op.kind is OpKind.EVICT:
            self._migrate("evict", op, at, host_place(), self._out)
            if self._waits_for_evictions:
                self._arrivals.setdefault(layer, []).append(self._event(self._out))
            return
        if op.kind is OpKind.PREFETCH:
            self._migrate("prefetch", op, at, device_place(self._ordinal), self._in)
        elif op.kind is OpKind.COPY_IN and self._staging is not None:
            self._stage(op, data_layer)
        else:
            raise ValueError(f"op {op.kind} is not served by runner=cuda with memory={self._kind}")
        self._arrivals.setdefault(at, []).append(self._event(self._in))

    def _stage(self, op: MemoryOp, data_layer: int) -> None:
        staging, far = self._staging, self._memory.host
        assert staging is not None and far is not None
        pairs = [(b - self._first_host, staging.slots[b]) for b in op.blocks if b in staging.slots]
        if pairs:
            layer, place = data_layer % self._spec.num_layers, staging.place(data_layer)
            self._counters.copy_blocks(
                *("h2d", far, staging.placed, pairs), layers=(layer, layer + 1), target_layer=place, stream=self._in
            )

    def _migrate(self, label: str, op: MemoryOp, layer: int, to: Any, stream: Any) -> None:
        parts = self._memory.device.layout.ranges(list(op.blocks), layers=(layer, layer + 1))
        self._counters.prefetch(label, self._memory.device.slab, parts, to, batched=True, stream=stream)

    def _await(self, layer: int) -> None:
        arrivals = self._arrivals.pop(layer, ())
        if not arrivals:
            return
        begin = self._timing_event()
        for event in arrivals:
            event.wait(stream=self._handle)
        self._waits.append((begin, self._timing_event()))

    def _timing_event(self) -> Any:
        """A timing event that completes after all work enqueued on the compute stream so far."""
        event = new_event(timing=True, device=self._ordinal)
        event.record(stream=self._handle)
        return event

    def _event(self, stream: Any) -> Any:
        """An event that completes after all work enqueued on the stream so far."""
        event = new_event(device=self._ordinal)
        event.record(stream=stream_handle(stream))
        return event


class _Bound(NamedTuple):
    """What the layers of a step are given, on the device; see _Step."""

    homes: Tensor
    table: Tensor
    seqs: Tensor
    positions: Tensor
    seqs_again: Tensor | None
    rows: Tensor | None
    """None: all of them."""
    fresh: list[slice]
    attention: PagedAttention


class PaddedBatch:
    """A decode batch of a fixed size at fixed addresses, with a plan whose capacity is fixed too."""

    def __init__(
        self,
        view: PagedKV,
        num_q_heads: int,
        num_seqs: int,
        max_tokens: int,
        device: torch.device,
        *,
        workspace: Slab | None,
    ) -> None:
        self.num_seqs, self._width = num_seqs, ceil_div(max_tokens, view.spec.block_size)
        one, most = np.ones(num_seqs, np.int32), np.full(num_seqs, max_tokens, np.int32)
        capacity = plan_capacity(view, num_q_heads=num_q_heads, query_lens=one, context_lens=most)
        self.attention = PagedAttention(view, num_q_heads=num_q_heads, capacity=capacity, workspace=workspace)
        self.integers = torch.zeros(num_seqs * (self._width + 2), dtype=torch.int32, device=device)
        homes, seqs, positions = self.integers.split([num_seqs * self._width, num_seqs, num_seqs])
        self.views = (homes.view(num_seqs, self._width), seqs, positions)

    def lay_out(self, batch: Sequence[SequenceRows], block_size: int) -> _Step:
        homes = np.full((self.num_seqs, self._width), NO_BLOCK, np.int32)
        seqs = np.full(self.num_seqs, -1, np.int32)
        positions, query_lens, context_lens = (np.zeros(self.num_seqs, np.int32) for _ in range(3))
        for i, s in enumerate(batch):
            count = ceil_div(s.total, block_size)
            homes[i, :count] = s.blocks[:count]
        n = len(batch)
        seqs[:n], query_lens[:n] = np.arange(n), 1
        context_lens[:n] = [s.total for s in batch]
        positions[:n] = context_lens[:n] - 1
        return _Step(homes, homes, seqs, seqs, positions, seqs, query_lens, context_lens, [])

    def close(self) -> None:
        self.attention.close()


class _Staging:
    """A ring in device memory for host blocks of the layers to come, and which block has which slot of it."""

    def __init__(self, spec: KVCacheSpec, capacity: KVCapacity, num_layers: int, device: int) -> None:
        self.num_layers = num_layers
        # Staged copies and claimed device blocks fit the device tier together: the policy holds that back.
        most = capacity.num_device_blocks * spec.num_layers // num_layers
        self._num_slots = min(capacity.num_host_blocks, most)
        ring = replace(spec, num_layers=num_layers, layout=Layout.LAYER_MAJOR)
        layout = slab_layout(ring, num_blocks=self._num_slots)
        self.placed = Placed(Slab.device(slab_bytes(ring, self._num_slots), device=device), layout)
        self._first_id, self._first_place = sum(capacity), 0
        self._free = list(range(self._num_slots))
        self.slots: dict[int, int] = {}
        self._ahead: dict[int, set[int]] = {}
        """Layer of the coming step -> what the step before has staged for it."""

    def begin_step(self, issued: Issued, num_layers: int) -> frozenset[int]:
        """Blocks that every layer of this step will find staged."""
        self._first_place = self.place(num_layers)  # Where the last step has put what it brought for this one.
        staged, ahead = self._ahead, dict[int, set[int]]()
        for ops in issued.values():
            for op, layer in ops:
                if op.kind is OpKind.COPY_IN:
                    side, at = (staged, layer) if layer < num_layers else (ahead, layer - num_layers)
                    side.setdefault(at, set()).update(op.blocks)
        everywhere = set.intersection(*(staged.get(layer, set()) for layer in range(num_layers)))
        wanted = everywhere.union(*ahead.values())
        for block in [b for b in self.slots if b not in wanted]:
            self._free.append(self.slots.pop(block))
        for block in sorted(wanted - self.slots.keys()):
            if self._free:  # What finds no slot is read in place.
                self.slots[block] = self._free.pop()
        # What has no slot now is not copied, and must not be taken for staged when it gets one.
        self._ahead = {layer: blocks & self.slots.keys() for layer, blocks in ahead.items()}
        return frozenset(everywhere & self.slots.keys())

    def place(self, data_layer: int) -> int:
        """In the ring, of a layer of this step, or from `num_layers` on of the next."""
        return (self._first_place + data_layer) % self.num_layers

    @property
    def is_empty(self) -> bool:
        return not self.slots

    def id_of(self, block: int) -> int:
        return self._first_id + self.slots[block]


class _Step(NamedTuple):
    """A step's tables, int32 on the host."""

    homes: npt.NDArray[np.int32]
    """[sequence, block]: where K and V are written."""
    table: npt.NDArray[np.int32]
    """The same where they are read: staged blocks by the ids of their copies."""
    seqs: npt.NDArray[np.int32]
    """[token]: row of the tables."""
    seqs_again: npt.NDArray[np.int32]
    """The same for tokens whose block is staged, to be written there too; -1 for the others."""
    positions: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    """Tokens whose attention is the kernel's, in the order of its packed batch."""
    query_lens: npt.NDArray[np.int32]
    """[sequence]: 0 where all of its context is new, which is torch's flash attention's."""
    context_lens: npt.NDArray[np.int32]
    fresh: list[slice]

    @property
    def writes_again(self) -> bool:
        return bool((self.seqs_again >= 0).any())


def _lay_out(batch: Sequence[SequenceRows], block_size: int, staged: frozenset[int], staging: _Staging | None) -> _Step:
    width = max(ceil_div(s.total, block_size) for s in batch)
    homes = np.full((len(batch), width), NO_BLOCK, np.int32)
    for row, s in zip(homes, batch, strict=True):
        count = ceil_div(s.total, block_size)
        row[:count] = s.blocks[:count]
    table = homes
    if staged and staging is not None:
        table = homes.copy()
        for block in np.unique(homes[np.isin(homes, list(staged))]).tolist():
            table[homes == block] = staging.id_of(block)
    seqs = np.repeat(np.arange(len(batch), dtype=np.int32), [s.num_new for s in batch])
    positions = np.concatenate([np.arange(s.context_len, s.total, dtype=np.int32) for s in batch])
    in_row = positions // block_size
    is_fresh = [s.context_len == 0 and s.num_new > 1 for s in batch]
    return _Step(
        homes,
        table,
        seqs,
        np.where(table[seqs, in_row] != homes[seqs, in_row], seqs, np.int32(-1)).astype(np.int32),
        positions,
        np.flatnonzero(~np.array(is_fresh)[seqs]).astype(np.int32),
        np.array([0 if new else s.num_new for s, new in zip(batch, is_fresh, strict=True)], np.int32),
        np.array([s.total for s in batch], np.int32),
        [slice(s.first, s.stop) for s, new in zip(batch, is_fresh, strict=True) if new],
    )


class _Tables:
    """Small arrays of integers on their way to the device: one copy per step, out of pinned memory."""

    def __init__(self, device: torch.device, stream: Any, dtype: torch.dtype) -> None:
        self._device, self._stream = device, stream
        self._host = torch.empty(0, dtype=dtype)
        self._sent: Any = None

    def send(self, *arrays: npt.NDArray[Any], into: Tensor | None = None) -> list[Tensor]:
        """Each on the device, in its shape; `into`: a tensor that takes them one after the other."""
        total = sum(a.size for a in arrays)
        if self._sent is not None:
            self._sent.synchronize()  # Out of this buffer the last step's tables went.
        if len(self._host) < total:
            on_gpu = self._device.type == "cuda"
            self._host = torch.empty(2 * total, dtype=self._host.dtype, pin_memory=on_gpu)
        out = self._host.numpy()
        start = 0
        for array in arrays:
            out[start : start + array.size] = array.ravel()
            start += array.size
        if into is None:
            sent = self._host[:total].to(self._device, non_blocking=True, copy=True)
        else:
            sent = into[:total].copy_(self._host[:total], non_blocking=True)
        self._sent = new_event(device=self._device.index or 0)
        self._sent.record(stream=stream_handle(self._stream))
        parts = sent.split([a.size for a in arrays])
        return [part.view(a.shape) for part, a in zip(parts, arrays, strict=True)]


def _packed(rows: Tensor) -> Tensor:
    """Heads side by side in each token's row, as the kernels read them; models give them so."""
    ok = rows.stride(-1) == 1 and (rows.stride(-2) == rows.shape[-1] or rows.shape[-2] == 1)
    return rows if ok else rows.contiguous()


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention of a sequence without cached context, by torch's flash attention. [token, head, dim]"""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa)[0].transpose(0, 1)
