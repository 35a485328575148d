"""KVCacheManager: the block tables of all sequences, what they have claimed, and how they grow.

A sequence first *claims* blocks per tier and then takes them as its tokens come: under worst-case admission the claim
is prompt plus output and growth inside it cannot fail; under optimistic admission the claim grows with the sequence.
Who may claim what is the placement policy's decision, not the manager's.

A table takes device and host blocks in the proportion of its claims, all along. So claims on both tiers fill at the
same pace, a host claim is not an empty insurance that lets worst-case admission admit like an optimistic one (no
comparison may mix the two), and the link's load is the same at every token of a sequence.

A sequence is held (it has a table on the pool's blocks) or swapped out (its blocks lie in the host tier and nobody
reads them), or unknown.
"""

from __future__ import annotations

from typing import NamedTuple

from uvm_kv.kvcache.block_pool import BlockPool
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.types import Allocation, Tier


class KVCapacity(NamedTuple):
    num_device_blocks: int
    num_host_blocks: int


def largest_table(capacity: KVCapacity, allocation: Allocation) -> KVCapacity:
    """The most blocks that one table can have: all there are, or those of a buddy allocator's largest chunk."""
    if not allocation.is_buddy:
        return capacity
    return KVCapacity(*(1 << num_blocks.bit_length() >> 1 for num_blocks in capacity))


class BlockTable:
    """Blocks of one sequence, in token order; append-only but for a swap or a relocation."""

    __slots__ = ("blocks", "device_claim", "host_claim", "num_device")

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.num_device = self.device_claim = self.host_claim = 0


class KVUsage(NamedTuple):
    """Bytes of KV memory.

    reserved is what the allocation scheme has taken for sequences: used + lost_inside. Of lost_inside, future will hold
    tokens before its sequence ends; the rest never will. claimed is what admission holds for sequences beyond that too;
    lost_outside is free but of no use to a request like the newest: too scattered, or the rest of a buddy's chunk.
    """

    claimed: int
    reserved: int
    used: int
    lost_inside: int
    lost_outside: int
    future: int


class KVCacheManager:
    def __init__(self, spec: KVCacheSpec, capacity: KVCapacity, allocation: Allocation = Allocation.PAGED) -> None:
        self.spec = spec
        self.capacity = capacity
        self.allocation = allocation
        self.pool = BlockPool(*capacity, allocation)
        self._tables: dict[int, BlockTable] = {}
        self._swapped: dict[int, BlockTable] = {}
        self._claimed = {Tier.DEVICE: 0, Tier.HOST: 0}
        self._host_blocks: tuple[int, ...] | None = ()
        self._last_request = 1
        """Blocks of the newest admission: what external fragmentation is measured against."""

    def available(self, tier: Tier) -> int:
        """Blocks that nobody has claimed."""
        total = self.capacity.num_device_blocks if tier is Tier.DEVICE else self.capacity.num_host_blocks
        return total - self._claimed[tier]

    def claimed(self, tier: Tier) -> int:
        return self._claimed[tier]

    def blocks(self, request_id: int) -> list[int]:
        return self._tables[request_id].blocks

    def num_slots(self, request_id: int) -> int:
        """Tokens that fit in the blocks already taken."""
        return len(self._tables[request_id].blocks) * self.spec.block_size

    @property
    def host_blocks(self) -> tuple[int, ...]:
        """Host blocks of all held sequences, in order of admission; the same object until they change."""
        if self._host_blocks is None:
            device = self.capacity.num_device_blocks
            self._host_blocks = tuple(
                b for t in self._tables.values() if t.num_device < len(t.blocks) for b in t.blocks if b >= device
            )
        return self._host_blocks

    def open(self, request_id: int, num_device: int, num_host: int, num_tokens: int) -> list[int] | None:
        """Claim blocks for a new table and take those of its first `num_tokens`; None if they cannot be had."""
        assert request_id not in self._tables, f"request {request_id} already has a table"
        if num_device > self.available(Tier.DEVICE) or num_host > self.available(Tier.HOST):
            return None
        self._tables[request_id] = BlockTable()
        self.claim(request_id, num_device, num_host)
        blocks = self.grow(request_id, num_tokens)
        if blocks is None:
            self.release(request_id)
            return None
        self._last_request = max(1, num_device + num_host)
        return blocks

    def claim(self, request_id: int, num_device: int, num_host: int) -> None:
        assert num_device <= self.available(Tier.DEVICE) and num_host <= self.available(Tier.HOST)
        table = self._tables[request_id]
        self._set_claim(table, table.device_claim + num_device, table.host_claim + num_host)

    def _set_claim(self, table: BlockTable, num_device: int, num_host: int) -> None:
        self._claimed[Tier.DEVICE] += num_device - table.device_claim
        self._claimed[Tier.HOST] += num_host - table.host_claim
        table.device_claim, table.host_claim = num_device, num_host

    def num_unclaimed(self, request_id: int, num_tokens: int) -> int:
        """Blocks that a table of `num_tokens` tokens needs beyond its claim."""
        table = self._tables[request_id]
        return max(0, self.spec.num_blocks(num_tokens) - table.device_claim - table.host_claim)

    def grow(self, request_id: int, num_tokens: int) -> list[int] | None:
        """Take claimed blocks until `num_tokens` tokens fit. Returns the new blocks; None where no run of blocks is
        free."""
        table = self._tables[request_id]
        whole = table.device_claim + table.host_claim
        target = self.spec.num_blocks(num_tokens) if self.allocation.grows else whole
        missing = target - len(table.blocks)
        if missing <= 0:
            return []
        new: list[int] | None
        if table.host_claim:
            assert not self.pool.contiguous, "a table in one piece lies on the device"
            new = self._take_from_both(table, target)
        else:
            new = self.pool.extend(table.blocks, missing) if table.blocks else self.pool.allocate(Tier.DEVICE, missing)
            if new is None:
                assert self.pool.contiguous, "a claimed block is missing"
                return None
        table.blocks += new
        num_host = sum(block >= self.capacity.num_device_blocks for block in new) if table.host_claim else 0
        table.num_device += len(new) - num_host
        assert len(table.blocks) <= table.device_claim + table.host_claim, "growth beyond the claim"
        if num_host:
            self._host_blocks = None
        return new

    def _take_from_both(self, table: BlockTable, target: int) -> list[int]:
        """The next blocks up to `target`, each of the tier whose turn it is by the claim's proportion."""
        claim, num_host = table.device_claim + table.host_claim, len(table.blocks) - table.num_device
        new: list[int] = []
        for count in range(len(table.blocks) + 1, target + 1):
            # Rounded to nearest: rounding down would leave short claims' host blocks to the very end.
            due = max((2 * count * table.host_claim + claim) // (2 * claim), count - table.device_claim)
            taken = self.pool.allocate(Tier.HOST if due > num_host else Tier.DEVICE, 1)
            assert taken is not None, "a claimed block is missing"
            num_host += due > num_host
            new += taken
        return new

    def relocate(self, request_id: int, num_tokens: int) -> tuple[list[int], list[int]] | None:
        """Move a contiguous table to a run with room for `num_tokens`: (old blocks, new table), None if there is none.

        The claim must already cover `num_tokens`.
        """
        return self._move(self._tables[request_id], Tier.DEVICE, self.spec.num_blocks(num_tokens))

    def _move(self, table: BlockTable, tier: Tier, num_blocks: int) -> tuple[list[int], list[int]] | None:
        """Give a table `num_blocks` other blocks of one tier: (old blocks, new blocks), None without room."""
        old, new = table.blocks, self.pool.allocate(tier, num_blocks)
        if new is None:
            return None
        self.pool.free(old)
        table.blocks, table.num_device = new, num_blocks if tier is Tier.DEVICE else 0
        return old, list(new)

    def release(self, request_id: int) -> list[int]:
        """Free the table of a held or swapped sequence with its claim. Returns the freed blocks."""
        table = self._tables.pop(request_id, None)
        if table is None:
            table = self._swapped.pop(request_id)
        elif table.num_device < len(table.blocks):
            self._host_blocks = None
        self._set_claim(table, 0, 0)
        self.pool.free(table.blocks)
        return table.blocks

    def swap_out(self, request_id: int) -> tuple[list[int], list[int]] | None:
        """Move a table that lies wholly on the device to the host: (device blocks, host blocks), None without room."""
        table = self._tables[request_id]
        num_blocks = len(table.blocks)
        assert table.num_device == num_blocks, "swap moves tables that lie on the device"
        moved = self._move(table, Tier.HOST, num_blocks) if num_blocks <= self.available(Tier.HOST) else None
        if moved is not None:
            self._set_claim(table, 0, num_blocks)
            self._swapped[request_id] = self._tables.pop(request_id)
        return moved

    def swap_in(self, request_id: int, device_claim: int) -> tuple[list[int], list[int]] | None:
        """Bring a swapped table back: (host blocks, device blocks), None without room."""
        table = self._swapped[request_id]
        num_blocks = len(table.blocks)
        fits = max(device_claim, num_blocks) <= self.available(Tier.DEVICE)
        moved = self._move(table, Tier.DEVICE, num_blocks) if fits else None
        if moved is not None:
            self._set_claim(table, device_claim, 0)
            self._tables[request_id] = self._swapped.pop(request_id)
        return moved

    def usage(self, num_tokens: int, num_future_tokens: int) -> KVUsage:
        """The present usage. `num_tokens`: tokens that hold KV, over all held and swapped sequences.
        `num_future_tokens`: tokens that slots of these sequences will hold later."""
        block_bytes = self.spec.block_bytes
        claimed = (self._claimed[Tier.DEVICE] + self._claimed[Tier.HOST]) * block_bytes
        free = self.pool.num_free(Tier.DEVICE) + self.pool.num_free(Tier.HOST)
        reserved = (sum(self.capacity) - free) * block_bytes
        used = num_tokens * self.spec.token_bytes
        outside = sum(self.pool.num_unusable(tier, self._last_request) for tier in Tier)
        future = num_future_tokens * self.spec.token_bytes
        return KVUsage(claimed, reserved, used, reserved - used, outside * block_bytes, future)

    def check_integrity(self) -> None:
        """Every block of every table is held once, counted, and in the tier that the table says."""
        self.pool.check_integrity()
        tables = [*self._tables.values(), *self._swapped.values()]
        blocks = [b for t in tables for b in t.blocks]
        assert len(set(blocks)) == len(blocks), "two tables hold the same block"
        device = self.capacity.num_device_blocks
        for table in tables:
            assert sum(b < device for b in table.blocks) == table.num_device <= table.device_claim
            assert len(table.blocks) <= table.device_claim + table.host_claim
            assert not any(self.pool.is_free(b) for b in table.blocks), "a held block counts as free"
        in_use = sum(self.capacity) - sum(self.pool.num_free(tier) for tier in Tier)
        assert in_use == len(blocks), "a block is in use by nobody"
        claims = {Tier.DEVICE: sum(t.device_claim for t in tables), Tier.HOST: sum(t.host_claim for t in tables)}
        assert self._claimed == claims and min(self.available(tier) for tier in Tier) >= 0
        expected = [b for t in self._tables.values() for b in t.blocks if b >= device]
        assert list(self.host_blocks) == expected, "the list of host blocks is stale"
