"""BlockPool: KV block ids of two tiers, with reference counts.

Invariants, checked by `check_integrity`: a block is free exactly if its reference count is 0; device ids are [0, D)
and host ids [D, D + H); an allocation is all or nothing ("cannot" is None and leaves the pool as it was).

Two disciplines. Paged: any free block, from a free list per tier, last in first out, so that the touched part of the
slab stays small. Contiguous: every allocation is one run of ids, first fit, found in the reference counts themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from uvm_kv.types import Tier

MAX_REFERENCES = 255
_ZERO_OR_ONE = bytes([0] + [1] * 255)


class BlockPool:
    def __init__(self, num_device_blocks: int, num_host_blocks: int, *, contiguous: bool = False) -> None:
        if num_device_blocks < 0 or num_host_blocks < 0:
            raise ValueError(
                f"a pool of {num_device_blocks} device and {num_host_blocks} host blocks; neither may be < 0"
            )
        self.num_device_blocks = num_device_blocks
        self.num_host_blocks = num_host_blocks
        self.contiguous = contiguous
        self._references = bytearray(num_device_blocks + num_host_blocks)
        self._free: dict[Tier, list[int]] = {
            tier: [] if contiguous else list(reversed(self._range(tier))) for tier in Tier
        }

    def _range(self, tier: Tier) -> range:
        total = self.num_device_blocks + self.num_host_blocks
        return range(self.num_device_blocks) if tier is Tier.DEVICE else range(self.num_device_blocks, total)

    def tier_of(self, block: int) -> Tier:
        return Tier.DEVICE if block < self.num_device_blocks else Tier.HOST

    def num_free(self, tier: Tier) -> int:
        if self.contiguous:
            span = self._range(tier)
            return self._references.count(0, span.start, span.stop)
        return len(self._free[tier])

    def num_unusable(self, tier: Tier, num_blocks: int) -> int:
        """Free blocks that no allocation of `num_blocks` could use (external fragmentation); 0 when paged."""
        if not self.contiguous or num_blocks < 1:
            return 0
        span = self._range(tier)
        runs = self._references[span.start : span.stop].translate(_ZERO_OR_ONE).split(b"\x01")
        return sum(len(run) % num_blocks for run in runs)

    def allocate(self, tier: Tier, num_blocks: int) -> list[int] | None:
        if self.contiguous:
            span = self._range(tier)
            start = self._references.find(bytes(num_blocks), span.start, span.stop) if num_blocks else span.start
            return None if start < 0 else self._take_run(start, num_blocks)
        free = self._free[tier]
        if num_blocks > len(free):
            return None
        blocks = [free.pop() for _ in range(num_blocks)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def extend(self, blocks: Sequence[int], num_blocks: int) -> list[int] | None:
        """More blocks for the allocation `blocks`, in its tier and, if contiguous, right behind it."""
        tier = self.tier_of(blocks[-1])
        if not self.contiguous:
            return self.allocate(tier, num_blocks)
        start, stop = blocks[-1] + 1, blocks[-1] + 1 + num_blocks
        if stop > self._range(tier).stop or any(self._references[start:stop]):
            return None
        return self._take_run(start, num_blocks)

    def _take_run(self, start: int, num_blocks: int) -> list[int]:
        self._references[start : start + num_blocks] = b"\x01" * num_blocks
        return list(range(start, start + num_blocks))

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each block, all of which must be in use."""
        for block in blocks:
            assert 0 < self._references[block] < MAX_REFERENCES, f"block {block} cannot be shared"
            self._references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """One reference less to each block; those without any become free."""
        references, device = self._references, self.num_device_blocks
        device_free, host_free = self._free[Tier.DEVICE], self._free[Tier.HOST]
        for block in reversed(blocks):
            count = references[block]
            assert count, f"block {block} is freed twice"
            references[block] = count - 1
            if count == 1 and not self.contiguous:
                (device_free if block < device else host_free).append(block)

    def references(self, block: int) -> int:
        return self._references[block]

    def check_integrity(self) -> None:
        for tier, free in self._free.items():
            ids = set(free)
            assert len(ids) == len(free), f"{tier}: a block is in the free list twice"
            unused = {block for block in self._range(tier) if self._references[block] == 0}
            assert self.contiguous or ids == unused, f"{tier}: free list and reference counts disagree"
