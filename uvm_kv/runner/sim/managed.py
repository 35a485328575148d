"""ManagedKV: the managed slab of a simulated GPU. Which pages a step touches, and what the driver then does.

Attention walks layer by layer and sequence by sequence, and reads whole KV blocks; within a layer a chunk that several
sequences share is touched once. What does not change from step to step is worked out once: the block tables are read
again only when they have changed, and a step in which nothing moves is not walked again until they do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from uvm_kv.hw.profile import HardwareProfile
from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.kvcache.ops import MemoryOp, OpKind
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.runner.sim.uvm.block import (
    BLOCK_PAGES,
    NOTHING,
    PAGE_BYTES,
    Access,
    Counts,
    Discard,
    Location,
    Policy,
    Prefetch,
    Rules,
    add,
    run_of,
)
from uvm_kv.runner.sim.uvm.cost import fault_s, prefetch_s
from uvm_kv.types import CHUNK_BYTES, Hints, Layout, ceil_div

Groups = dict[int, int]
"""Blocks by the chunks that hold them: number of a group of blocks -> which blocks of it, one bit each, in the order
in which they are touched. A group is as many blocks as a chunk packs, or one block where that is larger."""
Accesses = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Chunks, and the numbers of what is done to them."""


class Paged(NamedTuple):
    """The effects of a step's paging."""

    faults: Counts = NOTHING
    planned: Counts = NOTHING
    """Counts of the prefetches and evictions that a plan asked for."""
    seconds: float = 0.0
    """Time that the compute stream waited."""
    ahead_s: float = 0.0
    """Time of what is moved while layers run: prefetches of later ones, and the evictions beside them."""
    ahead_bytes: int = 0
    """Moved in that time, both ways."""


class Calls(NamedTuple):
    """Calls that are issued together: cudaMemPrefetchBatchAsync, each chunk a range of its own, walked once."""

    waits: bool
    """The layer before which they are issued waits for them."""
    chunks: NDArray[np.int32]
    actions: NDArray[np.int32]
    num_calls: int


class ManagedKV:
    def __init__(
        self,
        spec: KVCacheSpec,
        capacity: KVCapacity,
        hints: Hints,
        rules: Rules,
        profile: HardwareProfile,
        device_bytes: int | None = None,
    ) -> None:
        """`device_bytes`: what managed memory can get of the card; by default, just the device tier's chunks."""
        from uvm_kv.runner.sim.uvm.driver import UvmDriver

        self._spec = spec
        self._profile = profile
        self._hints = hints
        num_device, num_blocks = capacity.num_device_blocks, sum(capacity)
        num_chunks = spec.num_chunks(num_device) if device_bytes is None else device_bytes // CHUNK_BYTES
        self._driver = UvmDriver(spec.num_chunks(num_blocks), num_chunks, rules)
        num_groups = ceil_div(num_blocks, spec.pieces_per_chunk)
        self._layer_stride = num_groups * spec.chunks_per_piece if spec.layout is Layout.LAYER_MAJOR else 0
        """Chunks from one layer to the next; 0 where a block holds all layers."""
        self.first_remote = num_blocks
        """From this block on, blocks are read over the link because the hints say so."""
        # Read-mostly goes before the preferred location: what is read is duplicated, not read in place.
        if hints.preferred_location in ("host", "by_tier") and not hints.read_mostly:
            self.first_remote = 0 if hints.preferred_location == "host" else num_device
        self._first_host_group = ceil_div(num_device, spec.pieces_per_chunk)
        self._advise()
        self._first_remote_group = ceil_div(self.first_remote, spec.pieces_per_chunk)
        self._spans: dict[tuple[int, int, bool, bool], list[tuple[int, int]]] = {}
        self._freed: list[int] = []
        self._key: object = None
        self._moves: Sequence[MemoryOp] = ()
        self._calls: list[list[Calls]] = [[] for _ in range(spec.num_layers)]
        self._by_page = False
        """What is read over the link is counted by page, and not told by the block: some of it is prefetched."""
        self._accesses: list[Accesses] = []
        self._settled: Paged | None = None
        """What every further step over the same blocks does, once one has moved nothing."""

    def _advise(self) -> None:
        boundary = self._first_host_group * self._spec.chunks_per_piece
        stride = self._layer_stride or self._driver.num_blocks
        for start in range(0, self._driver.num_blocks, stride):
            self._driver.advise(range(start, min(start + boundary, start + stride)), self._policy(host_tier=False))
            self._driver.advise(range(start + boundary, start + stride), self._policy(host_tier=True))

    def _policy(self, *, host_tier: bool) -> Policy:
        hints, location = self._hints, self._hints.location(host_tier=host_tier)
        return Policy(None if location is None else Location(location), hints.accessed_by, hints.read_mostly)

    def group_of(self, block: int) -> tuple[int, int]:
        """(its group, its bit there)."""
        group, slot = divmod(block, self._spec.pieces_per_chunk)
        return group, 1 << slot

    @property
    def sees_writes(self) -> bool:
        """Whether a write differs from a read: of a read-duplicated page it ends the duplication."""
        return self._hints.read_mostly

    def populate(self, sequences: Iterable[Groups]) -> None:
        """A steady start: the GPU has touched these once, so each chunk is where the hints and the card's size left it.
        None of that takes time."""
        for chunks, actions in self._walk(sequences, ()):
            self._driver.run(chunks, actions)

    def free(self, blocks: Iterable[int]) -> None:
        """Note that a sequence has freed these blocks."""
        if self._hints.discard_on_free:
            self._freed.extend(blocks)

    def step(
        self,
        key: object,
        sequences: Iterable[Groups],
        written: Sequence[int],
        moves: Sequence[MemoryOp],
    ) -> Paged:
        """Page what the step touches. `key` is equal to that of the last call while `sequences` touch the same;
        `written` are the blocks that new KV goes to, if `sees_writes`; `moves` are prefetches and evictions."""
        discard_s = self._discard_freed()
        if moves is not self._moves:
            self._moves, self._calls = moves, self._read(moves)
            self._by_page = by_page(moves)
        if (key, written, self._by_page) != self._key:
            self._key, self._settled = (key, written, self._by_page), None
            self._accesses = self._walk(sequences, written)
        if self._settled is not None and not moves:
            return self._settled._replace(seconds=self._settled.seconds + discard_s)
        paged = self._touch() if moves else self._touch_unmoved()
        nothing_moved = paged.faults._replace(remote_read_pages=0, remote_write_pages=0) == NOTHING
        self._settled = paged if nothing_moved and not moves else None
        return paged._replace(seconds=paged.seconds + discard_s)

    def _touch_unmoved(self) -> Paged:
        chunks, actions = (np.concatenate(x) for x in zip(*self._accesses, strict=True))
        faults = self._driver.run(chunks, actions)
        return Paged(faults, NOTHING, fault_s(faults, self._profile))

    def _touch(self) -> Paged:
        """Before each layer what is issued there, in the plan's order."""
        faults = NOTHING
        moved = dict.fromkeys((True, False), (NOTHING, 0, 0))
        for (chunks, actions), issued in zip(self._accesses, self._calls, strict=True):
            for calls in issued:
                counts, num_calls, num_chunks = moved[calls.waits]
                counts = add(counts, self._driver.run(calls.chunks, calls.actions))
                moved[calls.waits] = counts, num_calls + calls.num_calls, num_chunks + len(calls.chunks)
            faults = add(faults, self._driver.run(chunks, actions))
        waited_s, ahead_s = (prefetch_s(*moved[waits], self._profile) for waits in (True, False))
        (late, *_), (ahead, *_) = moved[True], moved[False]
        num_pages = ahead.h2d_prefetch_pages + ahead.d2h_prefetch_pages + ahead.d2h_eviction_pages
        stall_s = fault_s(faults, self._profile) + waited_s
        return Paged(faults, add(late, ahead), stall_s, ahead_s, num_pages * PAGE_BYTES)

    def _read(self, moves: Sequence[MemoryOp]) -> list[list[Calls]]:
        """What is issued before each layer. A prefetch that could not be issued ahead is waited for. Evictions have
        the time of the prefetches that they go beside; without any, they make room for the very layer."""
        num_layers = self._spec.num_layers
        issued: list[list[Calls]] = [[] for _ in range(num_layers)]
        ahead = any(_runs_ahead(op) for op in moves)
        for op in moves:
            waits = not (_runs_ahead(op) or (ahead and op.kind is OpKind.EVICT))
            to = Location.DEVICE if op.kind is OpKind.PREFETCH else Location.HOST
            chunks = self._chunks_of(op.blocks)
            actions = np.full(len(chunks), self._driver.action(Prefetch(to)), np.int32)
            for layer in range(op.first_layer, op.last_layer):
                there = chunks + np.int32(layer % num_layers * self._layer_stride)
                issued[max(0, layer - op.lead)].append(Calls(waits, there, actions, 1))
        return [[_joined(list(calls)) for _, calls in groupby(queue, lambda c: c.waits)] for queue in issued]

    def _discard_freed(self) -> float:
        """One batch call for what was freed since the last step; nothing of it is copied back again."""
        if not self._freed:
            return 0.0
        layers = range(self._spec.num_layers if self._layer_stride else 1)
        masks: dict[int, int] = {}
        for block in self._freed:
            group, bit = self.group_of(block)
            for layer in layers:
                # A page that a live block shares is left alone.
                for offset, mask in self._pages(None, bit, inward=True).items():
                    chunk = layer * self._layer_stride + group * self._spec.chunks_per_piece + offset
                    masks[chunk] = masks.get(chunk, 0) | mask
        chunks = np.array(sorted(masks), np.int32)
        actions = [self._driver.action(Discard(masks[chunk])) for chunk in chunks.tolist()]
        self._driver.run(chunks, np.array(actions, np.int32))
        self._freed.clear()
        self._settled = None
        return self._profile.link.prefetch_call_us * 1e-6

    # ---- from blocks to pages

    def _walk(self, sequences: Iterable[Groups], written: Iterable[int]) -> list[Accesses]:
        """What each layer touches. New KV is written before attention reads."""
        read: Groups = {}
        for groups in sequences:
            for group, bits in groups.items():
                read[group] = read.get(group, 0) | bits
        write: Groups = {}
        for block in written:
            group, bit = self.group_of(block)
            write[group] = write.get(group, 0) | bit
        num_layers = self._spec.num_layers
        if self._layer_stride:
            chunks, actions = self._accesses_of(write, read, 0)
            return [(chunks + np.int32(layer * self._layer_stride), actions) for layer in range(num_layers)]
        return [self._accesses_of(write, read, layer) for layer in range(num_layers)]

    def _accesses_of(self, write: Groups, read: Groups, layer: int) -> Accesses:
        per_group = self._spec.chunks_per_piece
        first_remote = self._driver.num_blocks if self._by_page else self._first_remote_group
        parts: list[Accesses] = []
        for groups, is_write in ((write, True), (read, False)):
            if not groups:
                continue
            numbers = np.fromiter(groups, np.int32, len(groups))
            if len(set(groups.values())) == 1:
                bits = next(iter(groups.values()))
                here, there = (self._span(layer, bits, is_write, remote) for remote in (False, True))
                offsets = np.array([offset for offset, _ in here], np.int32)
                chunks = (numbers[:, None] * np.int32(per_group) + offsets).ravel()
                remote = numbers >= first_remote
                actions = np.where(remote[:, None], [number for _, number in there], [number for _, number in here])
                parts.append((chunks, actions.astype(np.int32).ravel()))
                continue
            pairs = [
                (group * per_group + offset, number)
                for group, bits in groups.items()
                for offset, number in self._span(layer, bits, is_write, group >= first_remote)
            ]
            parts.append(tuple(np.array(column, np.int32) for column in zip(*pairs, strict=True)))  # type: ignore[arg-type]
        if not parts:
            return np.zeros(0, np.int32), np.zeros(0, np.int32)
        chunks, actions = (np.concatenate(column) for column in zip(*parts, strict=True))
        return chunks, actions

    def _span(self, layer: int, bits: int, write: bool, remote: bool) -> list[tuple[int, int]]:
        """(offset of the chunk in its group, number of the access) for one layer of the blocks in `bits`."""
        key = (0 if self._layer_stride else layer, bits, write, remote)
        known = self._spans.get(key)
        if known is None:
            window = self._profile.managed.stream_fault_pages
            known = self._spans[key] = [
                (offset, self._driver.action(Access(mask, write, window, counts_remote=not remote)))
                for offset, mask in self._pages(layer, bits).items()
            ]
        return known

    def _pages(self, layer: int | None, bits: int, *, inward: bool = False) -> dict[int, int]:
        """Chunk within a group -> mask of the pages that hold a layer (all layers where None) of the blocks in `bits`,
        or with `inward` of those that hold nothing else. The layer does not matter where a chunk holds one only."""
        spec = self._spec
        whole = layer is None or self._layer_stride > 0
        size = spec.piece_bytes if whole else spec.layer_block_bytes
        masks: dict[int, int] = {}
        for slot in range(spec.pieces_per_chunk):
            if not bits >> slot & 1:
                continue
            start = slot * spec.piece_bytes + (0 if whole or layer is None else layer * size)
            first, last = start // PAGE_BYTES, ceil_div(start + size, PAGE_BYTES)
            if inward:
                first, last = ceil_div(start, PAGE_BYTES), (start + size) // PAGE_BYTES
            for chunk in range(first // BLOCK_PAGES, ceil_div(last, BLOCK_PAGES)):
                inside = max(first, chunk * BLOCK_PAGES), min(last, (chunk + 1) * BLOCK_PAGES)
                masks[chunk] = masks.get(chunk, 0) | run_of(inside[0] - chunk * BLOCK_PAGES, inside[1] - inside[0])
        return masks

    def _chunks_of(self, blocks: Sequence[int]) -> NDArray[np.int32]:
        """All chunks that hold the blocks of an op in its first layer, in address order."""
        per_group = self._spec.chunks_per_piece
        groups = sorted({self.group_of(block)[0] for block in blocks})
        return np.array([group * per_group + offset for group in groups for offset in range(per_group)], np.int32)


def by_page(moves: Sequence[MemoryOp]) -> bool:
    """Whether a plan moves managed memory to the device, so that where a block lies does not follow from its tier."""
    return any(op.kind is OpKind.PREFETCH for op in moves)


def _joined(calls: list[Calls]) -> Calls:
    chunks, actions = (np.concatenate(x) for x in zip(*((c.chunks, c.actions) for c in calls), strict=True))
    return Calls(calls[0].waits, chunks, actions, len(calls))


def _runs_ahead(op: MemoryOp) -> bool:
    return op.kind is OpKind.PREFETCH and op.first_layer >= op.lead > 0
