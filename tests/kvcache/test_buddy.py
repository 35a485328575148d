"""The buddy discipline of BlockPool, beside a textbook allocator that keeps free lists, splits and joins."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from uvm_kv.kvcache.block_pool import BlockPool, chunk_size
from uvm_kv.types import Allocation, Tier

BUDDIES = (Allocation.ORCA_MAX, Allocation.ORCA_POW2, Allocation.ORCA_ORACLE)


class FreeLists:
    """Knuth, The Art of Computer Programming, volume 1, section 2.5: one free list per size."""

    def __init__(self, num_blocks: int) -> None:
        self.free: list[set[int]] = [set() for _ in range(num_blocks.bit_length())]
        self.order: dict[int, int] = {}
        for k, starts in enumerate(self.free):
            if num_blocks >> k & 1:
                starts.add((num_blocks >> (k + 1)) << (k + 1))

    def take(self, num_blocks: int) -> int | None:
        wanted = (num_blocks - 1).bit_length()
        k = next((k for k in range(wanted, len(self.free)) if self.free[k]), None)
        if k is None:
            return None
        start = min(self.free[k])
        self.free[k].remove(start)
        for half in range(wanted, k):
            self.free[half].add(start + (1 << half))
        self.order[start] = wanted
        return start

    def give(self, start: int) -> None:
        k = self.order.pop(start)
        while (buddy := start ^ (1 << k)) in self.free[k]:
            self.free[k].remove(buddy)
            start, k = min(start, buddy), k + 1
        self.free[k].add(start)


class Walk(RuleBasedStateMachine):
    held: list[list[int]]

    @initialize(num_blocks=st.integers(0, 70), num_host=st.integers(0, 3), allocation=st.sampled_from(BUDDIES))
    def build(self, num_blocks: int, num_host: int, allocation: Allocation) -> None:
        self.num_blocks, self.held = num_blocks, []
        self.pool, self.reference = BlockPool(num_blocks, num_host, allocation), FreeLists(num_blocks)

    @rule(num_blocks=st.integers(1, 40))
    def take(self, num_blocks: int) -> None:
        blocks, start = self.pool.allocate(Tier.DEVICE, num_blocks), self.reference.take(num_blocks)
        assert (None if blocks is None else blocks[0]) == start
        if blocks is not None:
            assert blocks == list(range(blocks[0], blocks[0] + num_blocks))
            assert blocks[0] % chunk_size(num_blocks) == 0, "a chunk is aligned to its size"
            self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.free(blocks)
        self.reference.give(blocks[0])

    @invariant()
    def agrees(self) -> None:
        free = sorted((1 << k, start) for k, starts in enumerate(self.reference.free) for start in starts)
        assert sorted(self.pool._free_chunks(Tier.DEVICE)) == free
        assert self.pool.num_free(Tier.DEVICE) == self.num_blocks - sum(len(blocks) for blocks in self.held)
        self.pool.check_integrity()

    @invariant()
    def chunks_do_not_overlap(self) -> None:
        chunks = [b for blocks in self.held for b in range(blocks[0], blocks[0] + chunk_size(len(blocks)))]
        assert len(set(chunks)) == len(chunks)
        assert all(b < self.num_blocks for b in chunks)

    @invariant()
    def what_is_unusable_is_told(self) -> None:
        for num_blocks in (1, 3, 8):
            could = sum(size for size, _ in self.pool._free_chunks(Tier.DEVICE) if size >= num_blocks)
            assert self.pool.num_unusable(Tier.DEVICE, num_blocks) == self.pool.num_free(Tier.DEVICE) - could

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for blocks in self.held:
            self.pool.free(blocks)
        fresh = FreeLists(self.num_blocks).free
        assert sorted(self.pool._free_chunks(Tier.DEVICE)) == sorted(
            (1 << k, s) for k, x in enumerate(fresh) for s in x
        )
        assert self.pool.num_free(Tier.DEVICE) == self.num_blocks


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=150, stateful_step_count=40)


def test_a_host_tier_is_aligned_to_its_own_first_block() -> None:
    """Host blocks 5 to 13 are chunks of 8 and 1."""
    pool = BlockPool(5, 9, BUDDIES[0])
    assert pool.allocate(Tier.HOST, 1) == [13]
    assert pool.allocate(Tier.HOST, 3) == [5, 6, 7]
    assert pool.allocate(Tier.HOST, 3) == [9, 10, 11]
    assert pool.allocate(Tier.HOST, 1) is None
    assert (pool.num_free(Tier.DEVICE), pool.num_free(Tier.HOST)) == (5, 2)


def test_a_chunk_does_not_grow() -> None:
    pool = BlockPool(8, 0, BUDDIES[0])
    blocks = pool.allocate(Tier.DEVICE, 3)
    assert blocks == [0, 1, 2]
    with pytest.raises(AssertionError, match="does not grow"):
        pool.extend(blocks, 1)
