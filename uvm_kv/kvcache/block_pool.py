"""BlockPool: KV block ids of two tiers, and which of them are taken.

Device ids are [0, D) and host ids [D, D + H). An allocation is all or nothing ("cannot" is None and leaves the pool as
it was).

paged: any free block, from a free list per tier, last in first out, so that the touched part of the slab stays small.
first fit: every allocation is one run of ids, the first that is long enough.
buddy: every allocation is the beginning of a chunk of 2^k blocks, aligned to its size: the smallest free one that fits,
    split in halves as often as possible. The rest of the chunk is lost until it is freed. Since a free chunk is joined
    with its free buddy at once, the free chunks follow from which blocks are taken, and are not kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from uvm_kv.types import Allocation, Tier


def chunk_size(num_blocks: int) -> int:
    """Blocks of the smallest chunk of a buddy allocator that holds `num_blocks` >= 1."""
    return 1 << (num_blocks - 1).bit_length()


class BlockPool:
    def __init__(self, num_device_blocks: int, num_host_blocks: int, allocation: Allocation = Allocation.PAGED) -> None:
        if num_device_blocks < 0 or num_host_blocks < 0:
            raise ValueError(
                f"a pool of {num_device_blocks} device and {num_host_blocks} host blocks; neither may be < 0"
            )
        self.num_device_blocks = num_device_blocks
        self.num_host_blocks = num_host_blocks
        self.contiguous = allocation is not Allocation.PAGED
        self._is_buddy = allocation.is_buddy
        total = num_device_blocks + num_host_blocks
        self._range = {Tier.DEVICE: range(num_device_blocks), Tier.HOST: range(num_device_blocks, total)}
        self._taken = bytearray(total)
        self._free: dict[Tier, list[int]] = {
            tier: [] if self.contiguous else list(reversed(self._range[tier])) for tier in Tier
        }
        self._num_rest = dict.fromkeys(Tier, 0)
        """Blocks of taken chunks that nobody asked for."""

    def tier_of(self, block: int) -> Tier:
        return Tier.DEVICE if block < self.num_device_blocks else Tier.HOST

    def num_free(self, tier: Tier) -> int:
        """Blocks that no allocation holds."""
        if self.contiguous:
            span = self._range[tier]
            return self._taken.count(0, span.start, span.stop) + self._num_rest[tier]
        return len(self._free[tier])

    def num_unusable(self, tier: Tier, num_blocks: int) -> int:
        """Free blocks that no allocation of `num_blocks` could use (external fragmentation); 0 when paged."""
        if not self.contiguous or num_blocks < 1:
            return 0
        if self._is_buddy:
            size = chunk_size(num_blocks)
            return self._num_rest[tier] + sum(free for free, _ in self._free_chunks(tier) if free < size)
        span = self._range[tier]
        return sum(len(run) % num_blocks for run in self._taken[span.start : span.stop].split(b"\x01"))

    def allocate(self, tier: Tier, num_blocks: int) -> list[int] | None:
        if self._is_buddy:
            size = chunk_size(num_blocks)
            chunk = min((chunk for chunk in self._free_chunks(tier) if chunk[0] >= size), default=None)
            if chunk is None:
                return None
            self._num_rest[tier] += size - num_blocks
            return self._take_run(chunk[1], size)[:num_blocks]
        if self.contiguous:
            span = self._range[tier]
            start = self._taken.find(bytes(num_blocks), span.start, span.stop)
            return None if start < 0 else self._take_run(start, num_blocks)
        free = self._free[tier]
        if num_blocks > len(free):
            return None
        blocks = [free.pop() for _ in range(num_blocks)]
        for block in blocks:
            self._taken[block] = 1
        return blocks

    def extend(self, blocks: Sequence[int], num_blocks: int) -> list[int] | None:
        """More blocks for the allocation `blocks`, in its tier and, if contiguous, right behind it."""
        tier = self.tier_of(blocks[-1])
        if not self.contiguous:
            return self.allocate(tier, num_blocks)
        assert not self._is_buddy, "a chunk does not grow"
        start, stop = blocks[-1] + 1, blocks[-1] + 1 + num_blocks
        if stop > self._range[tier].stop or any(self._taken[start:stop]):
            return None
        return self._take_run(start, num_blocks)

    def _take_run(self, start: int, num_blocks: int) -> list[int]:
        self._taken[start : start + num_blocks] = b"\x01" * num_blocks
        return list(range(start, start + num_blocks))

    def _free_chunks(self, tier: Tier) -> Iterator[tuple[int, int]]:
        """(size, first block) of the buddy allocator's free chunks, in order of blocks."""
        span = self._range[tier]
        for run in re.finditer(b"\x00+", self._taken[span.start : span.stop]):
            start, stop = run.span()
            while start < stop:
                size = 1 << (stop - start).bit_length() - 1
                size = min(size, start & -start or size)  # Aligned, counted from the first block of the tier.
                yield size, span.start + start
                start += size

    def free(self, blocks: Sequence[int]) -> None:
        """Free any taken blocks. With a buddy allocator, `blocks` must be one whole allocation."""
        for block in blocks:
            assert self._taken[block], f"block {block} is freed twice"
            self._taken[block] = 0
        if self._is_buddy and blocks:
            rest = chunk_size(len(blocks)) - len(blocks)
            self._taken[blocks[-1] + 1 : blocks[-1] + 1 + rest] = bytes(rest)
            self._num_rest[self.tier_of(blocks[0])] -= rest
        if not self.contiguous:
            for block in reversed(blocks):
                self._free[self.tier_of(block)].append(block)

    def is_free(self, block: int) -> bool:
        return not self._taken[block]

    def check_integrity(self) -> None:
        for tier, free in self._free.items():
            ids = set(free)
            assert len(ids) == len(free), f"{tier}: a block is in the free list twice"
            unused = {block for block in self._range[tier] if self.is_free(block)}
            assert self.contiguous or ids == unused, f"{tier}: free list and taken blocks disagree"
