"""The reference model of the Unified Memory driver: results that can be worked out by hand, and its invariants."""

from __future__ import annotations

import random
from collections.abc import Callable
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runner.uvm_reference import PAGES, ReferenceDriver

ALL = list(range(PAGES))


def populated(num_blocks: int, capacity: int, prefetcher: str = "tree") -> ReferenceDriver:
    """Every page is resident and mapped on the CPU, as after initialisation by a CPU loop."""
    driver = ReferenceDriver(num_blocks, capacity, prefetcher=prefetcher)
    for block in range(num_blocks):
        driver.cpu_touch(block, ALL, write=True)
    driver.counts = dict.fromkeys(driver.counts, 0)
    return driver


def read(driver: ReferenceDriver, block: int) -> int:
    """Streams through a block; how many pages came."""
    before = driver.counts["h2d_pages"]
    driver.gpu_stream(block, ALL, write=False, window=5)
    return driver.counts["h2d_pages"] - before


def test_a_stream_doubles_its_migrations() -> None:
    driver = populated(1, 1)
    sizes = []
    while len(driver.snapshot()[0][0]) < PAGES:
        missing = [page for page in ALL if page not in driver.snapshot()[0][2]]
        before = driver.counts["h2d_pages"]
        driver.gpu_stream(0, missing[:5], write=False, window=5)
        sizes.append(driver.counts["h2d_pages"] - before)
    assert sizes == [16, 16, 32, 64, 128, 256]
    whole = populated(1, 1)
    assert read(whole, 0) == PAGES
    assert whole.counts == driver.counts
    assert whole.counts["migrations"] == whole.counts["fault_batches"] == whole.counts["fault_groups"] == 6
    assert whole.counts["cpu_mapped_pages"] == whole.counts["scattered_pages"] == PAGES


def test_the_prefetcher_decides_what_comes_along() -> None:
    none = populated(1, 1, "none")
    none.gpu_stream(0, [3, 99, 400], write=False, window=2)
    assert none.snapshot()[0][0] == {3, 99, 400}
    assert (none.counts["h2d_pages"], none.counts["fault_batches"]) == (3, 2)
    block = populated(1, 1, "block")
    block.gpu_stream(0, [3], write=False, window=1)
    assert (block.counts["h2d_pages"], block.counts["migrations"]) == (PAGES, 1)
    tree = populated(1, 1)
    tree.gpu_stream(0, [3, 400], write=False, window=2)
    assert tree.snapshot()[0][0] == {*range(16), *range(400, 416)}


def test_the_threshold_is_strict() -> None:
    half = ReferenceDriver(1, 1, threshold_percent=50)
    half.gpu_stream(0, [0], write=False, window=1)
    assert len(half.snapshot()[0][0]) == 16
    less = ReferenceDriver(1, 1, threshold_percent=49)
    less.gpu_stream(0, [0], write=False, window=1)
    assert len(less.snapshot()[0][0]) == 32


@pytest.mark.parametrize(("blocks", "capacity"), [(5, 3), (4, 1), (9, 8)])
def test_an_oversized_prefetch_moves_everything_twice(blocks: int, capacity: int) -> None:
    driver = populated(blocks, capacity)
    driver.prefetch(0, blocks - 1, "device")
    assert driver.counts["h2d_pages"] == 2 * blocks * PAGES
    assert driver.counts["d2h_eviction_pages"] == (2 * blocks - capacity) * PAGES
    assert driver.counts["migrations"] == 2 * blocks
    assert driver.lru() == list(range(blocks - capacity, blocks))


def test_a_prefetch_that_fits_moves_everything_once() -> None:
    driver = populated(3, 3)
    driver.prefetch(0, 2, "device")
    assert (driver.counts["h2d_pages"], driver.counts["migrations"]) == (3 * PAGES, 3)
    assert all(state[3] == set(ALL) for state in driver.snapshot())


def test_reading_does_not_protect_but_prefetching_does() -> None:
    for protect, survivors in [(False, [1, 2]), (True, [0, 2])]:
        driver = populated(3, 2)
        read(driver, 0)
        read(driver, 1)
        assert read(driver, 0) == 0
        if protect:
            driver.prefetch(0, 0, "device")
        read(driver, 2)
        assert driver.lru() == survivors


def test_read_mostly_data_leave_for_nothing() -> None:
    driver = populated(3, 1)
    driver.advise(0, 2, preferred=None, accessed_by_gpu=False, read_mostly=True)
    for block in (0, 1, 2, 0):
        assert read(driver, block) == PAGES
    assert driver.counts["dropped_pages"] == 3 * PAGES
    assert driver.counts["d2h_eviction_pages"] == 0
    driver.gpu_stream(0, [7], write=True, window=1)  # a write ends the duplication of its page, not of the others
    assert driver.snapshot()[0][1] == set(ALL) - {7}
    assert driver.counts["h2d_pages"] == 4 * PAGES


def test_accessed_by_reads_remotely_what_a_prefetch_could_not_keep() -> None:
    driver = populated(4, 2)
    driver.advise(0, 3, preferred=None, accessed_by_gpu=True, read_mostly=False)
    driver.prefetch(0, 3, "device")
    assert [len(state[0]) for state in driver.snapshot()] == [0, 0, PAGES, PAGES]
    before = dict(driver.counts)
    for block in range(4):
        driver.gpu_stream(block, ALL, write=True, window=5)
    assert driver.counts == before
    assert driver.counts["fault_groups"] == 0


def test_preferred_host_maps_after_one_fault() -> None:
    driver = populated(1, 1)
    driver.advise(0, 0, preferred="host", accessed_by_gpu=False, read_mostly=False)
    driver.gpu_stream(0, ALL, write=False, window=256)
    assert driver.counts["remote_maps"] == PAGES  # the pages are CPU-mapped: nothing is mapped along
    assert (driver.counts["h2d_pages"], driver.counts["fault_groups"], driver.lru()) == (0, 2, [])


def test_a_first_touch_at_the_preferred_location_populates_the_block() -> None:
    for preferred, gpu, cpu in [("device", PAGES, 0), ("host", 0, PAGES)]:
        driver = ReferenceDriver(1, 1)
        driver.advise(0, 0, preferred=preferred, accessed_by_gpu=False, read_mostly=False)
        driver.gpu_stream(0, [5], write=True, window=1)
        assert (len(driver.snapshot()[0][0]), len(driver.snapshot()[0][1])) == (gpu, cpu)
        assert driver.counts["zeroed_pages"] == gpu


def test_a_cyclic_scan_misses_every_time() -> None:
    driver = populated(4, 3)
    for block in [0, 1, 2, 3] * 3:
        assert read(driver, block) == PAGES
    assert driver.counts["evicted_chunks"] == 4 * 3 - 3


def test_an_evicted_block_is_contiguous_only_without_older_cpu_pages() -> None:
    driver = ReferenceDriver(2, 1)
    driver.prefetch(0, 0, "device")
    driver.cpu_touch(1, [0], write=True)
    for block in (1, 0, 1, 0):
        driver.prefetch(block, block, "device")
    assert driver.counts["h2d_pages"] == 16 + 3 * PAGES
    assert driver.counts["scattered_pages"] == 16 + PAGES  # twice block 1, never block 0


def test_random_single_faults_need_about_13_services() -> None:
    services = []
    for seed in range(40):
        driver = populated(1, 1)
        for page in random.Random(seed).sample(ALL, PAGES):
            driver.gpu_stream(0, [page], write=False, window=1)
        services.append(driver.counts["fault_groups"])
    assert 12.5 <= mean(services) <= 14.5


def test_a_batch_serves_blocks_in_order_and_replays_what_is_left() -> None:
    driver = populated(3, 1, "none")
    driver.gpu_batch([(2, 0), (0, 0), (1, 0), (0, 0)], write=False)
    # One chunk: each batch ends with the highest block mapped, and the others fault again.
    assert (driver.counts["fault_batches"], driver.counts["fault_groups"]) == (3, 3 + 2 + 1)
    wide = ReferenceDriver(1, 1, prefetcher="none", fault_batch=100)
    wide.gpu_batch([(0, page) for page in ALL], write=False)
    assert wide.counts["fault_batches"] == 6


def test_discarded_pages_move_for_nothing_and_leave_first() -> None:
    driver = populated(4, 3)
    for block in range(3):
        driver.prefetch(block, block, "device")
    driver.discard(1, 1)
    assert driver.lru() == [1, 0, 2]
    driver.gpu_stream(1, [0], write=True, window=1)  # ends the discarded state of the first 16 pages and what they pull
    assert driver.lru() == [0, 2, 1]
    driver.discard(1, 1)
    driver.prefetch(3, 3, "device")
    assert (driver.counts["dropped_pages"], driver.counts["d2h_eviction_pages"]) == (PAGES, 0)
    assert driver.snapshot()[1] == (frozenset(),) * 5 + (False,)


def test_a_chunk_without_pages_leaves_first() -> None:
    driver = populated(3, 2)
    read(driver, 0)
    read(driver, 1)
    driver.prefetch(1, 1, "host")
    assert driver.lru() == [1, 0]
    assert driver.counts["d2h_prefetch_pages"] == PAGES
    read(driver, 2)
    assert (driver.lru(), driver.counts["d2h_eviction_pages"]) == ([0, 2], 0)


# Random streams

BLOCKS = 4
block_numbers = st.integers(0, BLOCKS - 1)
page_lists = st.one_of(
    st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=12),
    st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES)).map(lambda run: ALL[run[0] : run[0] + run[1]]),
)
ranges = st.tuples(block_numbers, block_numbers).map(lambda ends: (min(ends), max(ends)))
Operation = Callable[[ReferenceDriver], None]


def stream(block: int, pages: list[int], write: bool, window: int) -> Operation:
    def run(driver: ReferenceDriver) -> None:
        driver.gpu_stream(block, pages, write, window)
        state = driver.snapshot()[block]
        assert set(pages) <= state[3 if write else 2]

    return run


def touch(block: int, pages: list[int], write: bool) -> Operation:
    def run(driver: ReferenceDriver) -> None:
        faults = driver.counts["cpu_faults"]
        driver.cpu_touch(block, pages, write)
        state = driver.snapshot()[block]
        assert set(pages) <= state[4]
        assert driver.counts["cpu_faults"] - faults <= len(set(pages))
        if write:
            assert not set(pages) & state[0]

    return run


def prefetch(ends: tuple[int, int], to: str) -> Operation:
    def run(driver: ReferenceDriver) -> None:
        driver.prefetch(*ends, to)
        last = driver.snapshot()[ends[1]]
        assert (last[0], last[2]) == (set(ALL), set(ALL)) if to == "device" else last[1] == last[4] == set(ALL)

    return run


plain_operations = st.one_of(
    st.builds(stream, block_numbers, page_lists, st.booleans(), st.sampled_from([1, 5, 256])),
    st.builds(
        lambda accesses, write: lambda driver: driver.gpu_batch(accesses, write),
        st.lists(st.tuples(block_numbers, st.integers(0, PAGES - 1)), max_size=20),
        st.booleans(),
    ),
    st.builds(touch, block_numbers, st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=12), st.booleans()),
    st.builds(prefetch, ranges, st.sampled_from(["device", "host"])),
    st.builds(
        lambda ends, preferred, accessed_by: (
            lambda driver: driver.advise(*ends, preferred=preferred, accessed_by_gpu=accessed_by, read_mostly=False)
        ),
        ranges,
        st.sampled_from([None, "device", "host"]),
        st.booleans(),
    ),
)
all_operations = st.one_of(
    plain_operations,
    st.builds(lambda ends: lambda driver: driver.discard(*ends), ranges),
    st.builds(
        lambda ends, preferred, accessed_by: (
            lambda driver: driver.advise(*ends, preferred=preferred, accessed_by_gpu=accessed_by, read_mostly=True)
        ),
        ranges,
        st.sampled_from([None, "device", "host"]),
        st.booleans(),
    ),
)
drivers = st.builds(
    lambda capacity, prefetcher: ReferenceDriver(BLOCKS, capacity, prefetcher=prefetcher, fault_batch=8),
    st.integers(1, BLOCKS),
    st.sampled_from(["none", "tree", "block"]),
)


def check(driver: ReferenceDriver) -> None:
    """What holds after every call."""
    for block, (gpu, cpu, gpu_mapped, gpu_writable, cpu_mapped, has_chunk) in zip(
        driver.blocks, driver.snapshot(), strict=True
    ):
        assert block.read_mostly or not gpu & cpu
        assert gpu_mapped <= gpu | cpu
        assert gpu_writable <= gpu_mapped
        assert not gpu_writable & gpu & cpu
        assert cpu_mapped <= cpu <= block.numbers("cpu_allocated")
        assert has_chunk or not gpu
        assert not block.follows_remotely or cpu - gpu - block.numbers("discarded") <= gpu_writable
        assert block.numbers("discarded") <= gpu | cpu
        assert not block.numbers("discarded") & (gpu_mapped | cpu_mapped)
    assert sorted(driver.lru()) == [index for index, block in enumerate(driver.blocks) if block.has_chunk]
    assert len(driver.lru()) <= driver.capacity_chunks
    counts = driver.counts
    assert counts["scattered_pages"] <= counts["h2d_pages"]
    assert counts["cpu_mapped_pages"] <= counts["h2d_pages"]
    assert counts["migrations"] <= counts["h2d_pages"] <= PAGES * counts["migrations"]
    assert counts["fault_batches"] <= counts["fault_groups"]
    assert counts["d2h_eviction_pages"] + counts["dropped_pages"] <= PAGES * counts["evicted_chunks"]


def on_gpu(driver: ReferenceDriver) -> int:
    return sum(len(state[0]) for state in driver.snapshot())


@settings(max_examples=60)
@given(drivers, st.lists(plain_operations, max_size=12))
def test_pages_are_conserved(driver: ReferenceDriver, operations: list[Operation]) -> None:
    """With one copy of each page, the pages that came minus the pages that left are the resident pages."""
    for operation in operations:
        operation(driver)
        check(driver)
        counts = driver.counts
        came = counts["h2d_pages"] + counts["zeroed_pages"]
        went = counts["d2h_fault_pages"] + counts["d2h_prefetch_pages"] + counts["d2h_eviction_pages"]
        assert on_gpu(driver) == came - went
        assert counts["dropped_pages"] == 0


@settings(max_examples=100)
@given(drivers, st.lists(all_operations, max_size=12))
def test_invariants_hold_under_every_advice(driver: ReferenceDriver, operations: list[Operation]) -> None:
    resident = 0
    for operation in operations:
        before = dict(driver.counts)
        operation(driver)
        check(driver)
        delta = {name: count - before[name] for name, count in driver.counts.items()}
        assert min(delta.values()) >= 0
        gained = delta["h2d_pages"] + delta["zeroed_pages"] - delta["d2h_eviction_pages"] - delta["dropped_pages"]
        assert on_gpu(driver) <= resident + gained
        resident = on_gpu(driver)
