"""BlockPool: all or nothing, and the three allocation disciplines."""

from __future__ import annotations

import pytest

from uvm_kv.kvcache.block_pool import BlockPool
from uvm_kv.types import Allocation, Tier

DEVICE, HOST = Tier.DEVICE, Tier.HOST
ON_DEMAND, BUDDY = Allocation.ON_DEMAND, Allocation.ORCA_ORACLE


def fragmented_pool() -> BlockPool:
    """Ten contiguous device blocks with free runs of 1, 3 and 2:  .##...##.."""
    pool = BlockPool(10, 0, ON_DEMAND)
    assert pool.allocate(DEVICE, 10) == list(range(10))
    pool.free([0, 3, 4, 5, 8, 9])
    return pool


@pytest.mark.parametrize("allocation", [Allocation.PAGED, ON_DEMAND])
@pytest.mark.parametrize(("tier", "ids"), [(DEVICE, range(4)), (HOST, range(4, 7))])
def test_a_tier_is_allocated_from_its_own_ids_and_all_or_nothing(
    allocation: Allocation, tier: Tier, ids: range
) -> None:
    pool = BlockPool(4, 3, allocation)
    assert pool.allocate(tier, len(ids) + 1) is None
    assert pool.num_free(tier) == len(ids)
    blocks = pool.allocate(tier, len(ids))
    assert blocks is not None
    assert sorted(blocks) == list(ids)
    assert all(pool.tier_of(b) is tier for b in blocks)
    assert pool.num_free(tier) == 0
    assert pool.allocate(tier, 1) is None
    pool.free(blocks)
    assert (pool.num_free(DEVICE), pool.num_free(HOST)) == (4, 3)
    pool.check_integrity()


def test_paged_blocks_are_reused_last_in_first_out() -> None:
    """The touched part of the slab stays small: what was freed last is handed out first, in its old order."""
    pool = BlockPool(8, 0)
    first, second = pool.allocate(DEVICE, 2), pool.allocate(DEVICE, 3)
    assert first is not None and second is not None
    pool.free(first)
    pool.free(second)
    assert pool.allocate(DEVICE, 5) == second + first


@pytest.mark.parametrize("allocation", [Allocation.PAGED, ON_DEMAND, BUDDY])
def test_a_double_free_is_a_bug(allocation: Allocation) -> None:
    pool = BlockPool(2, 0, allocation)
    blocks = pool.allocate(DEVICE, 1)
    assert blocks is not None
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


def test_contiguous_allocation_is_the_first_run_that_fits() -> None:
    pool = fragmented_pool()
    assert pool.allocate(DEVICE, 4) is None
    assert pool.allocate(DEVICE, 2) == [3, 4]
    assert pool.allocate(DEVICE, 2) == [8, 9]
    assert pool.allocate(DEVICE, 1) == [0]
    pool.check_integrity()


@pytest.mark.parametrize(
    ("last", "num_blocks", "expected"),
    [(2, 3, [3, 4, 5]), (2, 4, None), (7, 2, [8, 9]), (7, 3, None), (1, 1, None)],
    ids=["fills the gap", "runs into the next", "to the end", "beyond the tier", "no gap"],
)
def test_contiguous_extension_lies_right_behind(last: int, num_blocks: int, expected: list[int] | None) -> None:
    pool = fragmented_pool()
    num_free = pool.num_free(DEVICE)
    assert pool.extend([last], num_blocks) == expected
    assert pool.num_free(DEVICE) == num_free - len(expected or [])


def test_a_contiguous_device_run_does_not_extend_into_the_host_tier() -> None:
    pool = BlockPool(2, 2, ON_DEMAND)
    blocks = pool.allocate(DEVICE, 2)
    assert blocks is not None
    assert pool.extend(blocks, 1) is None
    assert pool.num_free(HOST) == 2


@pytest.mark.parametrize(("num_blocks", "unusable"), [(1, 0), (2, 2), (3, 3), (4, 6), (0, 0)])
def test_external_fragmentation_is_what_no_run_of_that_size_can_use(num_blocks: int, unusable: int) -> None:
    assert fragmented_pool().num_unusable(DEVICE, num_blocks) == unusable
    assert BlockPool(10, 0).num_unusable(DEVICE, num_blocks) == 0


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 device and 3 host"):
        BlockPool(-1, 3)


def test_the_integrity_check_sees_a_leak() -> None:
    pool = BlockPool(2, 0)
    pool._taken[0] = 1
    with pytest.raises(AssertionError, match="disagree"):
        pool.check_integrity()
