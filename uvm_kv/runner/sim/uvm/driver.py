"""UvmDriver: managed memory as NVIDIA's driver runs it: which block holds a chunk of the card, and which one loses it.

Invariants: no more blocks own a root chunk of 2 MiB than the card has; a block owns at most one; a chunk is on the list
that its block's state says (unused, discarded, used). The victim is the head of the first list that is not empty. A
chunk goes to the tail of its list when it is allocated, and whenever a fault or a prefetch makes something resident on
the GPU there, even if nothing moves; a plain access moves nothing, so eviction is least recently *faulted or
prefetched* (uvm_pmm_gpu.c, open-gpu-kernel-modules 595.45.04).

What happens to a block is worked out once for each pair of its state and an action, in `block.py`, and looked up
from then on by a compiled loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from uvm_kv.runner.sim.uvm.block import (
    BLOCK_PAGES,
    NO_ADVICE,
    NUM_COUNTS,
    PAGE_BYTES,
    Access,
    Action,
    Advise,
    BlockState,
    Counts,
    CpuAccess,
    Discard,
    Evict,
    Location,
    Policy,
    Prefetch,
    Rules,
    Unmap,
    apply,
    lowest,
)
from uvm_kv.runner.sim.uvm.thrashing import Processor, ThrashingDetector
from uvm_kv.types import CHUNK_BYTES

NO_CHUNK, UNUSED, DISCARDED, USED = range(4)
"""State of a block's chunk: none, or the list that it is on."""
DONE, UNKNOWN, WATCHED = range(3)
EVICT, ONCE = range(2)
"""Numbers of actions: the driver's own eviction, and an action that is done once and not remembered."""
FAULT_BATCH = 256
"""Largest number of faults that are fetched at once (uvm_perf_fault_batch_count)."""
MAX_KNOWN_STATES = 1 << 16
"""Beyond so many, or twice the number of blocks, the tables are rebuilt from the states that blocks are in."""
FAULT_BATCHES, FLUSHED_FAULTS, REMOTE_READ, REMOTE_WRITE, THROTTLES = map(
    Counts._fields.index, ("fault_batches", "flushed_faults", "remote_read_pages", "remote_write_pages", "throttles")
)
Ints = NDArray[np.int64]


class Outcome(NamedTuple):
    """What the loop needs of a transition, by its number."""

    state: NDArray[np.int32]
    chunk_list: NDArray[np.int8]
    touches: NDArray[np.bool_]
    does_nothing: NDArray[np.bool_]
    counts: Ints


class UvmDriver:
    """One managed range of `num_blocks` blocks of 2 MiB before one GPU that can hold `capacity_chunks` of them."""

    def __init__(
        self,
        num_blocks: int,
        capacity_chunks: int,
        rules: Rules | None = None,
        *,
        concurrent_managed_access: bool = True,
        thrashing: ThrashingDetector | None = None,
    ) -> None:
        if capacity_chunks < 1:
            raise ValueError(
                f"the device tier holds {capacity_chunks} chunks of 2 MiB; managed memory needs at least one: "
                f"raise memory.device_kv_bytes (uvm_replay: capacity_bytes)"
            )
        if num_blocks < 1:
            raise ValueError(f"the managed range holds {num_blocks} blocks of 2 MiB; it must hold at least one")
        if not concurrent_managed_access and num_blocks > capacity_chunks:
            raise ValueError(
                f"{num_blocks * CHUNK_BYTES} bytes of managed memory exceed the card's {capacity_chunks * CHUNK_BYTES} "
                f"and concurrent_managed_access=false (Windows, WSL2), where the GPU takes no page faults and managed "
                f"memory cannot be oversubscribed; allocate less, or use native Linux"
            )
        self.num_blocks = num_blocks
        self.capacity_chunks = capacity_chunks
        self.rules = rules or Rules()
        self.clock_us = 0.0
        """Set by the caller; thrashing is judged by it, and naps move it."""
        self._thrashing = thrashing or ThrashingDetector()
        self._state = np.zeros(num_blocks, np.int32)
        self._list = np.zeros(num_blocks, np.int8)
        # Doubly linked lists with a sentinel each, behind the blocks.
        self._next = np.full(num_blocks + 4, -1, np.int32)
        self._previous = np.full(num_blocks + 4, -1, np.int32)
        for sentinel in range(num_blocks, num_blocks + 4):
            self._next[sentinel] = self._previous[sentinel] = sentinel
        self._free = np.array([capacity_chunks], np.int64)
        self._watched = np.zeros(num_blocks, np.bool_)
        self._totals = np.zeros(NUM_COUNTS, np.int64)
        self._action_list: list[Action] = [Evict(), Evict()]
        self._actions: dict[Action, int] = {}
        self._states = [BlockState(policy=NO_ADVICE)]
        self._forget()

    # ---- what a program does

    def blocks(self, offset_bytes: int, num_bytes: int) -> range:
        """The blocks of a range; it must be managed, and of whole blocks, because advice is kept by block."""
        if offset_bytes % CHUNK_BYTES or num_bytes % CHUNK_BYTES or num_bytes < CHUNK_BYTES:
            raise ValueError(
                f"the range of {num_bytes} bytes at offset {offset_bytes} is misaligned; both must be multiples of "
                f"{CHUNK_BYTES} (2 MiB)"
            )
        if offset_bytes < 0 or offset_bytes + num_bytes > self.num_blocks * CHUNK_BYTES:
            raise ValueError(
                f"the range of {num_bytes} bytes at offset {offset_bytes} is not managed; the managed range has "
                f"{self.num_blocks * CHUNK_BYTES} bytes"
            )
        return range(offset_bytes // CHUNK_BYTES, (offset_bytes + num_bytes) // CHUNK_BYTES)

    def action(self, action: Action) -> int:
        """A number for an action, for `run`."""
        number = self._actions.setdefault(action, len(self._action_list))
        if number == len(self._action_list):
            self._action_list.append(action)
        return number

    def run(self, blocks: NDArray[np.int32], actions: NDArray[np.int32]) -> Counts:
        """Do `actions` (numbers) to `blocks`, in order; what that did."""
        before = self._totals.copy()
        position = 0
        while True:
            reason, position = _run(
                blocks,
                actions,
                position,
                self._state,
                self._list,
                self._next,
                self._previous,
                self._free,
                self._watched,
                self._keys,
                self._slots,
                *self._outcome,
                self._totals,
            )
            if reason == DONE:
                break
            block, action = int(blocks[position]), int(actions[position])
            if reason == WATCHED:
                self._run_watched(block, self._action_list[action])
                position += 1
            else:
                if action != ONCE:
                    self._learn(int(self._state[block]), action)
                self._learn_eviction()
        return Counts(*(self._totals - before).tolist())

    def do(self, blocks: Sequence[int], action: Action) -> Counts:
        """One action to each of `blocks`, in order."""
        return self.run(np.asarray(blocks, np.int32), np.full(len(blocks), self.action(action), np.int32))

    def gpu_random(self, pages: Ints, writes: Sequence[bool]) -> Counts:
        """Threads of a kernel touch `pages` (numbers within the range) once each, in this order: first to read, then
        to write, as `writes` says. What faults is fetched in batches of FAULT_BATCH, served by block in ascending
        order; the rest of the buffer is flushed and faults again."""
        before = self._totals.copy()
        position = 0
        while position < len(pages):
            start, batch = position, list[int]()
            while len(batch) < FAULT_BATCH and position < len(pages):
                some = pages[position : position + 4 * FAULT_BATCH]
                missing = np.flatnonzero(~self.accessible(some, writes[-1]))[: FAULT_BATCH - len(batch)]
                batch.extend(some[missing].tolist())
                position += int(missing[-1]) + 1 if len(batch) == FAULT_BATCH else len(some)
            for write in writes:
                self.gpu_batch(batch, write)
            num_remote = int(np.count_nonzero(~self.resident(pages[start:position])))
            self._totals[REMOTE_READ] += num_remote * (not all(writes))
            self._totals[REMOTE_WRITE] += num_remote * any(writes)
        return Counts(*(self._totals - before).tolist())

    def gpu_batch(self, pages: Sequence[int], write: bool) -> Counts:
        """The GPU touches `pages` (numbers within the range) all at once. A touch is done at the first replay that
        finds its page mapped."""
        before = self._totals.copy()
        pending = np.array(list(dict.fromkeys(pages)), np.int64)
        while len(pending := pending[~self.accessible(pending, write)]):
            num_batches = self._totals[FAULT_BATCHES]
            masks: dict[int, int] = {}
            for page in pending[:FAULT_BATCH].tolist():
                block, index = divmod(page, BLOCK_PAGES)
                masks[block] = masks.get(block, 0) | 1 << index
            for block in sorted(masks):
                self._do_once(block, Access(masks[block], write, counts_remote=False))
            self._totals[FAULT_BATCHES] = num_batches + 1
            self._totals[FLUSHED_FAULTS] += max(0, len(pending) - FAULT_BATCH)
        return Counts(*(self._totals - before).tolist())

    def accessible(self, pages: Ints, write: bool) -> NDArray[np.bool_]:
        """Which pages (numbers within the range) the GPU can touch without a fault."""
        return self._bits(pages, "gpu_write" if write else "gpu_map")

    def resident(self, pages: Ints) -> NDArray[np.bool_]:
        """Which pages (numbers within the range) are in the GPU's memory."""
        return self._bits(pages, "gpu")

    def _bits(self, pages: Ints, name: str) -> NDArray[np.bool_]:
        used, where = np.unique(self._state[pages // BLOCK_PAGES], return_inverse=True)
        octets = np.zeros((len(used), BLOCK_PAGES // 8), np.uint8)
        for row, number in enumerate(used.tolist()):
            mask: int = getattr(self._states[number], name)
            octets[row] = np.frombuffer(mask.to_bytes(BLOCK_PAGES // 8, "little"), np.uint8)
        bits = pages % BLOCK_PAGES
        found: NDArray[np.bool_] = (octets[where, bits >> 3] >> (bits & 7).astype(np.uint8) & 1).astype(np.bool_)
        return found

    def prefetch(self, blocks: range, to: Location) -> Counts:
        """cudaMemPrefetchAsync: a range of several blocks is walked twice, first to move, then to map."""
        before = self._totals.copy()
        for block in blocks:
            self._end_thrashing(block)
        if len(blocks) > 1:
            self.do(blocks, Prefetch(to, maps=False))
        self.do(blocks, Prefetch(to))
        return Counts(*(self._totals - before).tolist())

    def advise(self, blocks: range, policy: Policy) -> None:
        if policy.read_mostly:
            for block in blocks:
                self._end_thrashing(block)
        self.do(blocks, Advise(policy))

    def discard(self, blocks: range) -> None:
        self.do(blocks, Discard())

    def cpu_touch(self, block: int, mask: int, write: bool = False) -> Counts:
        before = self._totals.copy()
        self._watched[block] = True  # From here on the two processors may fight over it.
        self._run_watched(block, CpuAccess(mask, write))
        return Counts(*(self._totals - before).tolist())

    # ---- what can be seen

    def state(self, block: int) -> BlockState:
        return self._states[int(self._state[block])]

    def totals(self) -> Counts:
        return Counts(*self._totals.tolist())

    @property
    def num_chunks(self) -> int:
        """Root chunks in use."""
        return self.capacity_chunks - int(self._free[0])

    @property
    def host_bytes(self) -> int:
        """Host memory in use. Pages that were migrated to the GPU stay allocated until the range is freed."""
        numbers, blocks = np.unique(self._state, return_counts=True)
        pages = [self._states[i].cpu_pages.bit_count() for i in numbers.tolist()]
        return int(np.dot(pages, blocks)) * PAGE_BYTES

    def victims(self) -> list[int]:
        """Blocks that own a chunk, the next to lose it first."""
        order = []
        for which in (UNUSED, DISCARDED, USED):
            block = int(self._next[self.num_blocks + which])
            while block < self.num_blocks:
                order.append(block)
                block = int(self._next[block])
        return order

    def victim(self) -> int | None:
        for which in (UNUSED, DISCARDED, USED):
            block = int(self._next[self.num_blocks + which])
            if block < self.num_blocks:
                return block
        return None

    def check_integrity(self) -> None:
        order = self.victims()
        assert len(order) == len(set(order)) == self.num_chunks <= self.capacity_chunks
        for block in range(self.num_blocks):
            state = self.state(block)
            assert state.chunk == (self._list[block] != NO_CHUNK) == (block in set(order))
            assert self._list[block] == _list_of(state)
            assert not state.gpu or state.chunk, "resident without a chunk"
            assert not state.gpu & state.cpu or state.policy.read_mostly, "resident twice"
            assert not state.cpu & ~state.cpu_pages
            assert not state.gpu_write & ~state.gpu_map
            assert not state.cpu_write & ~state.cpu_map
            assert not state.cpu_map & ~state.cpu, "the CPU maps what is not there"
            assert not state.gpu_map & ~(state.gpu | state.cpu), "the GPU maps what is nowhere"

    # ---- tables

    def _forget(self) -> None:
        """Tables for the states that blocks are in, and no transitions."""
        used, self._state[:] = np.unique(self._state, return_inverse=True)
        self._states = [self._states[i] for i in used]
        self._numbers = {state: i for i, state in enumerate(self._states)}
        self._num_known = 1  # Slot 0 is for actions that are done once.
        self._keys = np.full(1 << 10, -1, np.int64)
        self._slots = np.zeros(1 << 10, np.int32)
        size = 1 << 9
        self._outcome = Outcome(
            np.zeros(size, np.int32),
            np.zeros(size, np.int8),
            np.zeros(size, np.bool_),
            np.zeros(size, np.bool_),
            np.zeros((size, NUM_COUNTS), np.int64),
        )

    def _number(self, state: BlockState) -> int:
        number = self._numbers.setdefault(state, len(self._states))
        if number == len(self._states):
            self._states.append(state)
        return number

    def _learn(self, state: int, action: int) -> None:
        """Work out what `action` does to a block in `state`."""
        if _find(self._keys, self._slots, state << 32 | action) >= 0:
            return
        if self._is_full():
            self._forget()
            return  # The numbers of the states have changed, so the loop asks again.
        if 2 * self._num_known >= len(self._keys):
            self._grow()
        self._fill(self._num_known, self._states[state], self._action_list[action])
        _insert(self._keys, self._slots, state << 32 | action, self._num_known)
        self._num_known += 1

    def _is_full(self) -> bool:
        # With blocks in as many states, rebuilding the tables would free nothing.
        return len(self._states) > max(MAX_KNOWN_STATES, 2 * self.num_blocks)

    def _learn_eviction(self) -> None:
        victim = self.victim()
        if victim is not None:
            self._learn(int(self._state[victim]), EVICT)

    def _fill(self, slot: int, before: BlockState, action: Action) -> None:
        after, counts, touches = apply(before, action, self.rules)
        outcome = self._outcome
        outcome.state[slot] = self._number(after)
        outcome.chunk_list[slot] = _list_of(after)
        outcome.touches[slot] = touches
        outcome.does_nothing[slot] = after == before and not touches and not any(counts)
        outcome.counts[slot] = counts

    def _do_once(self, block: int, action: Action) -> None:
        """Like `do`, for an action that will hardly come again."""
        if self._is_full():
            self._forget()
        # This order matters: learning must not displace the action in slot 0.
        self._learn_eviction()
        self._fill(0, self.state(block), action)
        self._action_list[ONCE] = action
        self.run(np.array([block], np.int32), np.array([ONCE], np.int32))

    def _grow(self) -> None:
        keys, slots = self._keys, self._slots
        self._keys = np.full(2 * len(keys), -1, np.int64)
        self._slots = np.zeros(2 * len(keys), np.int32)
        for i in np.flatnonzero(keys >= 0).tolist():
            _insert(self._keys, self._slots, keys[i], slots[i])
        self._outcome = Outcome(*(np.concatenate((x, np.zeros_like(x))) for x in self._outcome))  # type: ignore[arg-type]

    # ---- thrashing: blocks that the CPU touches, too

    def _end_thrashing(self, block: int) -> None:
        if self._watched[block]:
            self._thrashing.reset(block)

    def _run_watched(self, block: int, action: Action) -> None:
        """An action on a block that both processors touch, one fault service at a time."""
        self._watched[block] = False  # So that the compiled loop takes it.
        try:
            match action:
                case Access():
                    self._touch_watched(block, action.mask, action.write, action.window, Processor.GPU)
                case CpuAccess():
                    self._touch_watched(block, action.mask, action.write, 1, Processor.CPU)
                case _:
                    self.do([block], action)
        finally:
            self._watched[block] = True

    def _touch_watched(self, block: int, mask: int, write: bool, window: int, processor: Processor) -> None:
        by_gpu, detector = processor is Processor.GPU, self._thrashing
        ended = detector.unpinned(block, self.clock_us)
        if ended:
            self.do([block], Unmap(ended))
        at_hand = mask & _accessible(self.state(block), processor, write)
        if by_gpu and at_hand:
            self.do([block], Access(at_hand, write))
        while missing := mask & ~_accessible(self.state(block), processor, write):
            faulted = lowest(missing, window)
            wait_us = detector.throttle_us(block, faulted, processor, self.clock_us)
            if wait_us:
                self._totals[THROTTLES] += 1
                self.clock_us += wait_us
            before = self.state(block)
            thrashing = detector.pages(block, self.clock_us)
            pinned = detector.pinned(block, faulted, before.policy.preferred, self.clock_us)
            faulted = faulted & pinned or faulted
            if by_gpu:
                self.do([block], Access(faulted, write, window, thrashing, bool(pinned)))
            else:
                self.do([block], CpuAccess(faulted, write, thrashing))
            after = self.state(block)
            moved = (before.gpu ^ after.gpu) | (before.cpu ^ after.cpu)
            if moved and not before.policy.read_mostly:
                detector.record(block, moved, processor, self.clock_us)


def _accessible(state: BlockState, processor: Processor, write: bool) -> int:
    """Pages that the processor can touch without a fault."""
    if processor is Processor.GPU:
        return state.gpu_write if write else state.gpu_map
    return state.cpu_write if write else state.cpu_map


def _list_of(state: BlockState) -> int:
    if not state.chunk:
        return NO_CHUNK
    if not state.gpu:
        return UNUSED
    return USED if state.gpu & ~state.discarded else DISCARDED


# ---- compiled


@njit(cache=True)
def _find(keys: Ints, slots: NDArray[np.int32], key: int) -> int:
    mask = len(keys) - 1
    at = ((key ^ (key >> 29)) * 0x9E3779B1) & mask
    while keys[at] != key:
        if keys[at] == -1:
            return -1
        at = (at + 1) & mask
    return int(slots[at])


@njit(cache=True)
def _insert(keys: Ints, slots: NDArray[np.int32], key: int, value: int) -> None:
    mask = len(keys) - 1
    at = ((key ^ (key >> 29)) * 0x9E3779B1) & mask
    while keys[at] != -1:
        at = (at + 1) & mask
    keys[at] = key
    slots[at] = value


@njit(cache=True)
def _run(
    blocks: NDArray[np.int32],
    actions: NDArray[np.int32],
    position: int,
    state: NDArray[np.int32],
    chunk_list: NDArray[np.int8],
    next_: NDArray[np.int32],
    previous: NDArray[np.int32],
    free: Ints,
    watched: NDArray[np.bool_],
    keys: Ints,
    slots: NDArray[np.int32],
    out_state: NDArray[np.int32],
    out_list: NDArray[np.int8],
    out_touches: NDArray[np.bool_],
    out_does_nothing: NDArray[np.bool_],
    out_counts: Ints,
    totals: Ints,
) -> tuple[int, int]:
    """Carry on from `position`; (why it stopped, where)."""
    num_blocks = len(state)
    for i in range(position, len(blocks)):
        block = blocks[i]
        if watched[block]:
            return WATCHED, i
        number = 0 if actions[i] == ONCE else _find(keys, slots, int(state[block]) << 32 | actions[i])
        if number < 0:
            return UNKNOWN, i
        if out_does_nothing[number]:
            continue
        allocates = chunk_list[block] == NO_CHUNK and out_list[number] != NO_CHUNK
        if allocates and free[0] == 0:
            victim = num_blocks
            for which in (UNUSED, DISCARDED, USED):
                if victim >= num_blocks:
                    victim = next_[num_blocks + which]
            eviction = _find(keys, slots, int(state[victim]) << 32)
            if eviction < 0:
                return UNKNOWN, i
            next_[previous[victim]] = next_[victim]
            previous[next_[victim]] = previous[victim]
            chunk_list[victim] = NO_CHUNK
            state[victim] = out_state[eviction]
            for k in range(totals.shape[0]):
                totals[k] += out_counts[eviction, k]
            free[0] += 1
        state[block] = out_state[number]
        if out_touches[number] or out_list[number] != chunk_list[block]:
            if allocates:
                free[0] -= 1
            else:
                next_[previous[block]] = next_[block]
                previous[next_[block]] = previous[block]
            if out_list[number] == NO_CHUNK:
                free[0] += 1
            else:
                sentinel = num_blocks + out_list[number]
                last = previous[sentinel]
                next_[last] = block
                previous[block] = last
                next_[block] = sentinel
                previous[sentinel] = block
            chunk_list[block] = out_list[number]
        for k in range(totals.shape[0]):
            totals[k] += out_counts[number, k]
    return DONE, len(blocks)
