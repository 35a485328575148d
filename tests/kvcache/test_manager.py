"""KVCacheManager: claims, growth, swap and relocation; "cannot" is None and leaves everything as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.helpers import make_spec
from uvm_kv.kvcache.manager import KVCacheManager, KVCapacity, KVUsage, largest_table
from uvm_kv.types import Allocation, Tier

DEVICE, HOST = Tier.DEVICE, Tier.HOST
PAGED, ON_DEMAND, RESERVE_MAX = Allocation.PAGED, Allocation.ON_DEMAND, Allocation.RESERVE_MAX
ORCA = Allocation.ORCA_ORACLE
BLOCK = make_spec().block_bytes
TOKEN = make_spec().token_bytes


def make_manager(num_device: int, num_host: int = 0, allocation: Allocation = PAGED) -> KVCacheManager:
    return KVCacheManager(make_spec(), KVCapacity(num_device, num_host), allocation)


def state(kv: KVCacheManager) -> tuple[object, ...]:
    kv.check_integrity()
    free = tuple(kv.pool.num_free(tier) for tier in Tier)
    return free, kv.available(DEVICE), kv.available(HOST), kv.host_blocks, kv.usage(0, 0)


def test_open_claims_the_worst_case_and_takes_only_what_the_prompt_needs() -> None:
    kv = make_manager(8)
    assert kv.open(1, 5, 0, num_tokens=6) == [0, 1]
    assert (kv.available(DEVICE), kv.claimed(DEVICE), kv.pool.num_free(DEVICE)) == (3, 5, 6)
    assert kv.num_slots(1) == 8
    assert kv.grow(1, 8) == []
    assert kv.grow(1, 9) == [2]
    assert kv.num_unclaimed(1, 20) == 0
    assert kv.num_unclaimed(1, 21) == 1
    assert kv.release(1) == [0, 1, 2]
    assert state(kv) == state(make_manager(8))


def test_blocks_of_both_tiers_come_in_the_proportion_of_the_claim() -> None:
    """A claim of 2 + 2: every second block lies on the host, at any length of the sequence."""
    kv = make_manager(2, 4)
    assert kv.open(1, 2, 2, num_tokens=9) == [2, 0, 3]
    assert kv.host_blocks == (2, 3)
    before = kv.host_blocks
    assert kv.grow(1, 12) == []
    assert kv.grow(1, 16) == [1]
    assert kv.host_blocks is before
    kv.release(1)
    assert kv.host_blocks == ()
    kv.check_integrity()


@pytest.mark.parametrize("device", [0, 1, 3, 7, 8])
def test_a_split_claim_is_used_up_exactly_whatever_the_steps(device: int) -> None:
    host = 8 - device
    kv = make_manager(8, 8)
    kv.open(1, device, host, num_tokens=1)
    for num_tokens in range(1, 8 * kv.spec.block_size + 1):
        assert kv.grow(1, num_tokens) is not None
        blocks = kv.blocks(1)
        num_host = sum(b >= 8 for b in blocks)
        assert abs(num_host - len(blocks) * host / 8) < 1
    assert len(kv.host_blocks) == host
    kv.check_integrity()


def refused_open(kv: KVCacheManager) -> object:
    return kv.open(9, 4, 0, num_tokens=4)


def refused_run(kv: KVCacheManager) -> object:
    return kv.open(9, 3, 0, num_tokens=12)


def refused_growth(kv: KVCacheManager) -> object:
    return kv.grow(1, 16)


def refused_relocation(kv: KVCacheManager) -> object:
    return kv.relocate(1, 16)


@pytest.mark.parametrize("attempt", [refused_open, refused_run, refused_growth, refused_relocation])
def test_what_cannot_be_had_leaves_a_contiguous_cache_untouched(attempt: Callable[[KVCacheManager], object]) -> None:
    """11.3.. where the first table claims two blocks more: neither two behind it nor a run of four are free."""
    kv = make_manager(6, allocation=ON_DEMAND)
    for request_id, num_blocks in ((1, 2), (2, 1), (3, 1), (4, 2)):
        assert kv.open(request_id, num_blocks, 0, num_blocks * 4) is not None
    kv.release(2)
    kv.release(4)
    if attempt is not refused_run:
        kv.claim(1, 2, 0)
    before = state(kv)
    assert attempt(kv) is None
    assert state(kv) == before


def test_opening_what_does_not_fit_is_none() -> None:
    kv = make_manager(2, 1)
    before = state(kv)
    assert kv.open(1, 3, 0, num_tokens=1) is None
    assert kv.open(1, 0, 2, num_tokens=1) is None
    assert state(kv) == before
    kv.open(1, 1, 0, num_tokens=1)
    with pytest.raises(AssertionError, match="already has a table"):
        kv.open(1, 1, 0, num_tokens=1)


def test_growth_beyond_the_claim_is_a_bug() -> None:
    kv = make_manager(4)
    kv.open(1, 1, 0, num_tokens=4)
    with pytest.raises(AssertionError, match="beyond the claim"):
        kv.grow(1, 5)


def test_a_swapped_table_leaves_the_device_and_comes_back_whole() -> None:
    kv = make_manager(4, 3)
    device = kv.open(1, 3, 0, num_tokens=8)
    assert device == [0, 1]
    moved = kv.swap_out(1)
    assert moved == ([0, 1], [4, 5])
    assert (kv.available(DEVICE), kv.available(HOST)) == (4, 1)
    assert kv.host_blocks == ()  # Nobody reads a swapped sequence.
    kv.check_integrity()
    assert kv.open(2, 2, 0, num_tokens=8) == [0, 1]
    assert kv.swap_in(1, device_claim=3) is None
    assert kv.swap_in(1, device_claim=2) == ([4, 5], [2, 3])
    assert kv.blocks(1) == [2, 3]
    assert (kv.available(DEVICE), kv.available(HOST)) == (0, 3)
    kv.release(1)
    kv.release(2)
    assert state(kv) == state(make_manager(4, 3))


def test_a_full_host_tier_refuses_a_swap() -> None:
    kv = make_manager(4, 1)
    kv.open(1, 2, 0, num_tokens=8)
    before = state(kv)
    assert kv.swap_out(1) is None
    assert state(kv) == before


def test_a_swapped_sequence_can_be_released() -> None:
    kv = make_manager(4, 4)
    kv.open(1, 2, 0, num_tokens=8)
    kv.swap_out(1)
    kv.release(1)
    assert state(kv) == state(make_manager(4, 4))


def test_relocation_moves_a_contiguous_table_to_a_longer_run() -> None:
    """12..... : the first table cannot grow in place, and moves behind the second."""
    kv = make_manager(7, allocation=ON_DEMAND)
    kv.open(1, 1, 0, num_tokens=4)
    kv.open(2, 1, 0, num_tokens=4)
    kv.claim(1, 2, 0)
    assert kv.grow(1, 12) is None
    assert kv.relocate(1, 12) == ([0], [2, 3, 4])
    assert kv.blocks(1) == [2, 3, 4]
    assert kv.pool.is_free(0)
    kv.check_integrity()


@pytest.mark.parametrize(
    ("allocation", "claim", "future", "expected"),
    [
        pytest.param(PAGED, 2, 2, KVUsage(2 * BLOCK, 2 * BLOCK, 5 * TOKEN, 3 * TOKEN, 0, 2 * TOKEN), id="paged"),
        pytest.param(
            ON_DEMAND, 2, 2, KVUsage(2 * BLOCK, 2 * BLOCK, 5 * TOKEN, 3 * TOKEN, 0, 2 * TOKEN), id="on_demand"
        ),
        pytest.param(
            RESERVE_MAX, 7, 12, KVUsage(7 * BLOCK, 7 * BLOCK, 5 * TOKEN, 23 * TOKEN, 2 * BLOCK, 12 * TOKEN), id="max"
        ),
        pytest.param(
            ORCA, 5, 12, KVUsage(5 * BLOCK, 5 * BLOCK, 5 * TOKEN, 15 * TOKEN, 3 * BLOCK, 12 * TOKEN), id="a chunk of 8"
        ),
    ],
)
def test_bytes_reserved_used_and_lost(allocation: Allocation, claim: int, future: int, expected: KVUsage) -> None:
    """One sequence of 5 tokens in blocks of 4: reserved = used + lost inside, in each allocation scheme."""
    kv = make_manager(16, allocation=allocation)
    kv.open(1, claim, 0, num_tokens=5)
    assert kv.num_slots(1) == claim * 4
    usage = kv.usage(5, future)
    assert usage == expected
    assert usage.reserved == usage.used + usage.lost_inside
    kv.check_integrity()


@pytest.mark.parametrize(("allocation", "lost"), [(ON_DEMAND, 2), (PAGED, 0)])
def test_only_a_fragmented_contiguous_cache_loses_bytes_outside(allocation: Allocation, lost: int) -> None:
    """Requests of 2, 1, 3 and 2 blocks; when the one of 1 block ends, a request of 2 cannot use the hole."""
    kv = make_manager(9, allocation=allocation)
    for request_id, num_blocks in enumerate((2, 1, 3, 2)):
        kv.open(request_id, num_blocks, 0, num_blocks * 4)
    assert kv.usage(32, 0).lost_outside == (0 if allocation is PAGED else BLOCK)
    kv.release(1)
    assert kv.usage(28, 0).lost_outside == lost * BLOCK
    kv.check_integrity()


def test_a_chunk_that_cannot_be_had_leaves_the_cache_untouched() -> None:
    """Eleven blocks are chunks of 8, 2 and 1: two requests of 3 blocks take a chunk of 4 each, and 3 blocks are left,
    none of which lie in a chunk of 4."""
    kv = make_manager(11, allocation=ORCA)
    assert kv.open(1, 3, 0, num_tokens=1) == [0, 1, 2]
    assert kv.open(2, 3, 0, num_tokens=1) == [4, 5, 6]
    before = state(kv)
    assert kv.open(3, 3, 0, num_tokens=1) is None
    assert state(kv) == before
    assert kv.open(3, 2, 0, num_tokens=1) == [8, 9]
    kv.release(1)
    kv.release(2)
    assert kv.open(4, 8, 0, num_tokens=1) == list(range(8))  # Buddies are one again.
    kv.check_integrity()


def test_the_largest_table_of_a_buddy_allocator_is_its_largest_chunk() -> None:
    assert largest_table(KVCapacity(11, 0), PAGED) == (11, 0)
    assert largest_table(KVCapacity(11, 0), RESERVE_MAX) == (11, 0)
    assert largest_table(KVCapacity(11, 0), ORCA) == (8, 0)
    assert largest_table(KVCapacity(16, 1), ORCA) == (16, 1)
