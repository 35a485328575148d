"""The fast driver model beside the page-exact reference, and on closed forms."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tests.runner.uvm_reference import ReferenceDriver
from uvm_kv.runner.sim.uvm.block import (
    BLOCK_PAGES,
    FULL,
    NO_ADVICE,
    Access,
    BlockState,
    Counts,
    CpuAccess,
    Discard,
    Evict,
    Location,
    Policy,
    Prefetch,
    Prefetcher,
    Rules,
    apply,
    run_of,
)
from uvm_kv.runner.sim.uvm.driver import UvmDriver
from uvm_kv.runner.sim.uvm.thrashing import Processor, ThrashingDetector
from uvm_kv.types import CHUNK_BYTES

WINDOW = 5


def mask_of(pages: Any) -> int:
    return sum(1 << page for page in pages)


def pages_of(mask: int) -> frozenset[int]:
    return frozenset(i for i in range(BLOCK_PAGES) if mask >> i & 1)


# ---- against the reference


def random_pages(rng: random.Random) -> list[int]:
    match rng.randrange(4):
        case 0:
            return [rng.randrange(BLOCK_PAGES)]
        case 1:
            return list(range(BLOCK_PAGES))
        case 2:
            first = rng.randrange(BLOCK_PAGES)
            return list(range(first, min(BLOCK_PAGES, first + rng.choice((4, 16, 64, 200)))))
        case _:
            return sorted(rng.sample(range(BLOCK_PAGES), rng.randrange(1, 40)))


def both_do(rng: random.Random, fast: UvmDriver, slow: ReferenceDriver, advice: bool) -> str:
    """One random call on both models."""
    num_blocks = fast.num_blocks
    block = rng.randrange(num_blocks)
    last = min(num_blocks - 1, block + rng.randrange(3))
    span = range(block, last + 1)
    write = rng.random() < 0.5
    kind = rng.choices(
        ("stream", "batch", "cpu", "prefetch", "discard", "advise"), (10, 4, 3, 3, 1, 2 if advice else 0)
    )[0]
    match kind:
        case "stream":
            pages, window = random_pages(rng), rng.choice((1, WINDOW, 64))
            fast.do([block], Access(mask_of(pages), write, window))
            slow.gpu_stream(block, pages, write, window)
        case "batch":
            accesses = [
                (rng.randrange(num_blocks), rng.randrange(BLOCK_PAGES)) for _ in range(rng.choice((3, 40, 300)))
            ]
            fast.gpu_batch([b * BLOCK_PAGES + p for b, p in accesses], write)
            slow.gpu_batch(accesses, write)
        case "cpu":
            pages = random_pages(rng)
            fast.do([block], CpuAccess(mask_of(pages), write))
            slow.cpu_touch(block, pages, write)
        case "prefetch":
            to = rng.choice(tuple(Location))
            fast.prefetch(span, to)
            slow.prefetch(block, last, to.value)
        case "discard":
            fast.discard(span)
            slow.discard(block, last)
        case "advise":
            policy = Policy(rng.choice((None, *Location)), rng.random() < 0.5, rng.random() < 0.3)
            fast.advise(span, policy)
            slow.advise(
                block,
                last,
                preferred=policy.preferred and policy.preferred.value,
                accessed_by_gpu=policy.accessed_by,
                read_mostly=policy.read_mostly,
            )
    return f"{kind} {span} write={write}"


def assert_equal(fast: UvmDriver, slow: ReferenceDriver, after: str) -> None:
    counts = fast.totals()._asdict()
    counts["h2d_pages"] = counts["h2d_fault_pages"] + counts["h2d_prefetch_pages"]
    assert {name: counts[name] for name in slow.counts} == slow.counts, after
    assert fast.victims() == slow.lru(), after
    for block, (gpu, cpu, gpu_map, gpu_write, cpu_map, chunk) in enumerate(slow.snapshot()):
        state = fast.state(block)
        ours = tuple(map(pages_of, (state.gpu, state.cpu, state.gpu_map, state.gpu_write, state.cpu_map)))
        assert (*ours, state.chunk) == (gpu, cpu, gpu_map, gpu_write, cpu_map, chunk), f"block {block} after {after}"


@pytest.mark.parametrize("prefetcher", Prefetcher)
@pytest.mark.parametrize("seed", range(8))
def test_counts_and_states_are_those_of_the_reference(prefetcher: Prefetcher, seed: int) -> None:
    rng = random.Random(seed)
    num_blocks, capacity = rng.choice(((3, 1), (4, 2), (5, 2), (6, 3)))
    threshold = rng.choice((51, 51, 25, 90))
    fast = UvmDriver(num_blocks, capacity, Rules(prefetcher, threshold))
    slow = ReferenceDriver(num_blocks, capacity, prefetcher=prefetcher.value, threshold_percent=threshold)
    for step in range(60):
        done = both_do(rng, fast, slow, advice=seed % 2 == 1)
        assert_equal(fast, slow, f"step {step}: {done}")
    fast.check_integrity()
    assert fast.totals().fault_groups > 0
    assert fast.totals().evicted_chunks > 0


# ---- closed forms


def touched_by_cpu(num_blocks: int, capacity: int, **rules: Any) -> UvmDriver:
    driver = UvmDriver(num_blocks, capacity, Rules(**rules))
    driver.do(range(num_blocks), CpuAccess(FULL, write=True))
    return driver


def stream(driver: UvmDriver, blocks: Any, write: bool = False) -> Counts:
    return driver.do(list(blocks), Access(FULL, write, WINDOW))


def test_a_sequential_block_takes_six_migrations() -> None:
    state, sizes = apply(BlockState(), CpuAccess(FULL, write=True), Rules()).state, []
    for first in range(0, BLOCK_PAGES, BIG := 16):
        fault = apply(state, Access(run_of(first, WINDOW), window=WINDOW), Rules())
        if fault.counts.fault_groups:
            sizes.append(fault.counts.h2d_fault_pages * 4)
        state = fault.state
    assert BIG == 16
    assert sizes == [64, 64, 128, 256, 512, 1024]  # KiB
    assert stream(touched_by_cpu(1, 1), [0]).migrations == 6


def test_without_the_prefetcher_only_what_faults_moves() -> None:
    driver = touched_by_cpu(1, 1, prefetcher=Prefetcher.NONE)
    assert driver.do([0], Access(run_of(7, 3))).h2d_fault_pages == 3
    assert stream(driver, [0]) == Counts(
        fault_groups=102,
        fault_batches=102,
        migrations=102,
        h2d_fault_pages=509,
        cpu_mapped_pages=509,
        scattered_pages=509,
    )
    whole = touched_by_cpu(1, 1, prefetcher=Prefetcher.BLOCK)
    assert whole.do([0], Access(1)).h2d_fault_pages == BLOCK_PAGES


@pytest.mark.parametrize(("num_blocks", "capacity"), [(12, 8), (40, 8), (9, 8)])
def test_one_prefetch_beyond_capacity_moves_most_of_it_twice(num_blocks: int, capacity: int) -> None:
    """The pass that maps starts with blocks that the pass that moved has evicted already."""
    driver = touched_by_cpu(num_blocks, capacity)
    counts = driver.prefetch(range(num_blocks), Location.DEVICE)
    assert counts.h2d_prefetch_pages == 2 * num_blocks * BLOCK_PAGES
    assert counts.d2h_eviction_pages == (2 * num_blocks - capacity) * BLOCK_PAGES
    fits = touched_by_cpu(num_blocks, num_blocks).prefetch(range(num_blocks), Location.DEVICE)
    assert fits.h2d_prefetch_pages == num_blocks * BLOCK_PAGES
    assert fits.evicted_chunks == fits.fault_groups == 0


def test_prefetching_a_resident_block_protects_it_and_reading_it_does_not() -> None:
    driver = touched_by_cpu(4, 3)
    stream(driver, [0, 1, 2])
    assert stream(driver, [0]) == Counts()
    assert driver.victims() == [0, 1, 2]
    again = driver.prefetch(range(1), Location.DEVICE)
    assert again == Counts()
    assert driver.victims() == [1, 2, 0]
    stream(driver, [3])
    assert stream(driver, [0]) == Counts()
    assert stream(driver, [1]).evicted_chunks == 1


def test_read_mostly_data_is_evicted_without_a_copy() -> None:
    driver = UvmDriver(6, 2)
    driver.advise(range(6), Policy(read_mostly=True))
    driver.do(range(6), CpuAccess(FULL, write=True))
    counts = stream(driver, range(6))
    assert (counts.evicted_chunks, counts.d2h_eviction_pages, counts.dropped_pages) == (4, 0, 4 * BLOCK_PAGES)
    # A write ends the duplication of what it writes, and that is copied back.
    driver.do([5], Access(run_of(0, 10), write=True))
    assert stream(driver, [0, 1]).d2h_eviction_pages == 10


def test_discarded_data_is_evicted_without_a_copy_and_before_what_is_used() -> None:
    driver = UvmDriver(4, 3)
    stream(driver, [0, 1, 2], write=True)
    driver.discard(range(2, 3))
    assert driver.victims() == [2, 0, 1]
    assert stream(driver, [3], write=True).d2h_eviction_pages == 0
    # A discarded block that is touched again faults, is used again, and moves nothing.
    driver.discard(range(1, 2))
    counts = stream(driver, [1], write=True)
    assert counts.fault_groups > 0 and counts.h2d_fault_pages == counts.zeroed_pages == 0
    assert driver.victims() == [0, 3, 1]


def test_what_accessed_by_overflows_stays_remote() -> None:
    driver = touched_by_cpu(8, 5)
    driver.advise(range(8), Policy(accessed_by=True))
    driver.prefetch(range(8), Location.DEVICE)
    for _ in range(3):
        counts = stream(driver, range(8))
        assert counts.fault_groups == counts.evicted_chunks == 0
        assert counts.remote_read_pages == 3 * BLOCK_PAGES


@pytest.mark.parametrize("capacity", [1, 4, 100])
def test_a_cyclic_scan_over_one_block_too_many_misses_every_time(capacity: int) -> None:
    driver = UvmDriver(capacity + 1, capacity)
    stream(driver, range(capacity + 1))
    for _ in range(4):
        counts = stream(driver, range(capacity + 1))
        assert counts.evicted_chunks == capacity + 1
        assert counts.h2d_fault_pages == counts.d2h_eviction_pages == (capacity + 1) * BLOCK_PAGES
    fits = UvmDriver(capacity + 1, capacity + 1)
    stream(fits, range(capacity + 1))
    assert stream(fits, range(capacity + 1)) == Counts()


def test_an_evicted_page_returns_more_cheaply_than_one_that_the_cpu_touched_first() -> None:
    by_cpu = stream(touched_by_cpu(1, 1), [0])
    assert by_cpu.cpu_mapped_pages == by_cpu.scattered_pages == BLOCK_PAGES
    driver = UvmDriver(2, 1)
    stream(driver, [0, 1])  # Nowhere before: evicted whole, into one CPU chunk of 2 MiB.
    back = stream(driver, [0])
    assert back.h2d_fault_pages == BLOCK_PAGES
    assert back.cpu_mapped_pages == back.scattered_pages == 0
    older = touched_by_cpu(2, 1)
    stream(older, [0, 1])  # The CPU's small pages are still there, and are what the block is evicted to.
    again = stream(older, [0])
    assert (again.cpu_mapped_pages, again.scattered_pages) == (0, BLOCK_PAGES)


def test_cpu_pages_stay_allocated_after_a_migration() -> None:
    driver = touched_by_cpu(1, 1)
    stream(driver, [0])
    assert (driver.state(0).cpu, driver.state(0).cpu_pages) == (0, FULL)
    assert driver.host_bytes == CHUNK_BYTES


ADVICE = {
    "none": NO_ADVICE,
    "device": Policy(Location.DEVICE),
    "host": Policy(Location.HOST),
    "host, accessed by": Policy(Location.HOST, accessed_by=True),
    "accessed by": Policy(accessed_by=True),
    "read mostly": Policy(read_mostly=True),
}


@pytest.mark.parametrize(
    ("advice", "faults", "moves", "remote"),
    [
        ("none", True, True, False),
        ("device", True, True, False),
        ("host", True, False, True),
        ("host, accessed by", False, False, True),
        ("accessed by", False, False, True),
        ("read mostly", True, True, False),
    ],
)
def test_advice_and_what_a_touch_by_the_gpu_does(advice: str, faults: bool, moves: bool, remote: bool) -> None:
    driver = touched_by_cpu(1, 1)
    driver.advise(range(1), ADVICE[advice])
    counts = stream(driver, [0])
    assert bool(counts.fault_groups) == faults
    assert bool(counts.h2d_fault_pages) == moves
    assert bool(counts.remote_read_pages) == remote
    assert (driver.state(0).cpu == FULL) == (advice != "none" and advice != "device")
    assert stream(driver, [0]).fault_groups == 0


@pytest.mark.parametrize(
    ("advice", "comes_back"),
    [("none", True), ("device", True), ("accessed by", False), ("read mostly", True)],
)
def test_advice_and_what_comes_after_an_eviction(advice: str, comes_back: bool) -> None:
    driver = touched_by_cpu(2, 1)
    driver.advise(range(2), ADVICE[advice])
    driver.prefetch(range(1), Location.DEVICE)
    driver.prefetch(range(1, 2), Location.DEVICE)  # Evicts block 0.
    counts = stream(driver, [0])
    assert bool(counts.h2d_fault_pages) == comes_back
    assert bool(counts.remote_read_pages) != comes_back


@pytest.mark.parametrize(
    ("advice", "moved"),
    [("none", 512), ("device", 1), ("accessed by", 512), ("read mostly", 0)],
)
def test_advice_and_what_a_touch_by_the_cpu_does(advice: str, moved: int) -> None:
    """None and accessed by: the tree brings all that is left of the block, once enough of it is there; with the device
    preferred only what faulted; read-mostly keeps both copies."""
    driver = touched_by_cpu(1, 1)
    driver.advise(range(1), ADVICE[advice])
    driver.prefetch(range(1), Location.DEVICE)
    touch = run_of(0, 300) if moved == 512 else 1
    counts = driver.cpu_touch(0, touch)
    assert counts.d2h_fault_pages == moved
    remote = stream(driver, [0]).remote_read_pages
    assert bool(remote) == (advice == "accessed by")


def test_a_block_that_is_nowhere_and_prefers_the_gpu_is_populated_at_once() -> None:
    driver = UvmDriver(1, 1)
    driver.advise(range(1), Policy(Location.DEVICE))
    counts = driver.do([0], Access(1))
    assert (counts.fault_groups, counts.zeroed_pages) == (1, BLOCK_PAGES)


def test_random_single_faults_take_about_fourteen_services_a_block() -> None:
    services = []
    for seed in range(30):
        driver = touched_by_cpu(1, 1)
        order = list(range(BLOCK_PAGES))
        random.Random(seed).shuffle(order)
        services.append(sum(driver.do([0], Access(1 << page)).fault_groups for page in order))
    assert 13 <= np.mean(services) <= 14.5


def test_a_batch_holds_256_faults_and_serves_blocks_in_ascending_order() -> None:
    driver = touched_by_cpu(300, 300)
    counts = driver.gpu_batch([block * BLOCK_PAGES for block in reversed(range(300))], write=False)
    assert (counts.fault_batches, counts.fault_groups) == (2, 300)
    assert counts.flushed_faults == 300 - 256, "what a full batch leaves over is flushed and faults again"
    assert (counts.service_runs, Counts(fault_batches=41).service_runs) == (1, 3)
    # The last 256 of the list were fetched first, in ascending order.
    assert driver.victims() == [*range(44, 300), *range(44)]


# ---- thrashing


def fight(driver: UvmDriver, rounds: int, pause_us: float = 100.0) -> Counts:
    """CPU and GPU write the same page in turn."""
    before = np.array(driver.totals())
    for _ in range(rounds):
        driver.clock_us += pause_us
        driver.do([0], Access(1, write=True))
        driver.clock_us += pause_us
        driver.cpu_touch(0, 1, write=True)
    return Counts(*(np.array(driver.totals()) - before).tolist())


def test_a_page_that_both_processors_write_is_throttled_and_then_pinned() -> None:
    driver = touched_by_cpu(1, 1)
    counts = fight(driver, 40)
    assert counts.throttles >= 10
    assert counts.remote_maps == 1, "pinned on the CPU, where both reach it"
    settled = fight(driver, 20)
    assert settled.fault_groups == settled.cpu_faults == settled.throttles == 0
    driver.clock_us += 200_000  # The pin has run out.
    assert fight(driver, 1).fault_groups == 1


def test_a_fight_slower_than_the_lapse_is_not_thrashing() -> None:
    counts = fight(touched_by_cpu(1, 1), 40, pause_us=600.0)
    assert counts.throttles == counts.remote_maps == 0
    assert counts.fault_groups == 40


def test_with_the_device_preferred_the_page_keeps_moving() -> None:
    driver = touched_by_cpu(1, 1)
    driver.advise(range(1), Policy(Location.DEVICE))
    counts = fight(driver, 40)
    assert counts.throttles >= 10
    assert counts.remote_maps == 0


def test_one_gpu_that_evicts_and_faults_back_never_thrashes() -> None:
    driver = touched_by_cpu(3, 2)
    stream(driver, range(3))
    driver.cpu_touch(0, 1)
    stream(driver, range(3))
    for _ in range(50):
        driver.clock_us += 10.0
        counts = stream(driver, range(3), write=True)
        assert (counts.evicted_chunks, counts.throttles) == (3, 0)


def test_a_prefetch_by_the_program_ends_the_thrashing() -> None:
    detector = ThrashingDetector()
    for i in range(6):
        detector.record(0, 1, (Processor.CPU, Processor.GPU)[i % 2], 100.0 * i)
    assert detector.pages(0, 600.0) == 1
    detector.reset(0)
    assert detector.pages(0, 600.0) == 0


# ---- properties and bad input


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_lost_or_resident_twice(seed: int) -> None:
    rng = random.Random(seed)
    driver = UvmDriver(6, rng.randrange(1, 6))
    for _ in range(80):
        blocks = sorted(rng.sample(range(6), 2))
        match rng.randrange(5):
            case 0:
                driver.advise(
                    range(*blocks), Policy(rng.choice((None, *Location)), rng.random() < 0.5, rng.random() < 0.3)
                )
            case 1:
                driver.prefetch(range(*blocks), rng.choice(tuple(Location)))
            case 2:
                driver.cpu_touch(blocks[0], mask_of(random_pages(rng)), rng.random() < 0.5)
            case _:
                driver.do(blocks, Access(mask_of(random_pages(rng)), rng.random() < 0.5, WINDOW))
        driver.check_integrity()


@pytest.mark.parametrize("seed", range(10))
def test_bytes_are_conserved(seed: int) -> None:
    """What is on the GPU is what came by a copy or was zeroed there, less what went by a copy."""
    rng = random.Random(seed)
    driver = UvmDriver(6, rng.randrange(1, 6))
    for _ in range(80):
        first, last = sorted(rng.sample(range(7), 2))
        match rng.randrange(5):
            case 0:
                driver.advise(range(first, last), Policy(rng.choice((None, *Location)), rng.random() < 0.5))
            case 1:
                driver.prefetch(range(first, last), rng.choice(tuple(Location)))
            case 2:
                driver.cpu_touch(first, mask_of(random_pages(rng)), rng.random() < 0.5)
            case 3:
                driver.gpu_batch([rng.randrange(6 * BLOCK_PAGES) for _ in range(300)], rng.random() < 0.5)
            case _:
                driver.do([first], Access(mask_of(random_pages(rng)), rng.random() < 0.5, WINDOW))
        c = driver.totals()
        came = c.h2d_fault_pages + c.h2d_prefetch_pages + c.zeroed_pages
        went = c.d2h_fault_pages + c.d2h_prefetch_pages + c.d2h_eviction_pages
        assert sum(driver.state(block).gpu.bit_count() for block in range(6)) == came - went


def test_what_was_discarded_is_prefetched_without_a_copy() -> None:
    driver = touched_by_cpu(5, 5)
    driver.discard(range(5))
    counts = driver.prefetch(range(5), Location.DEVICE)
    assert counts.h2d_prefetch_pages == 0 and counts.zeroed_pages == 5 * BLOCK_PAGES


def test_tables_are_rebuilt_without_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def counts() -> list[Counts]:
        driver = touched_by_cpu(4, 2)
        pages = np.random.default_rng(0).permutation(4 * BLOCK_PAGES)
        return [driver.gpu_random(pages, (False, True)), stream(driver, range(4)), driver.totals()]

    expected = counts()
    monkeypatch.setattr("uvm_kv.runner.sim.uvm.driver.MAX_KNOWN_STATES", 5)
    monkeypatch.setattr(UvmDriver, "_is_full", lambda self: len(self._states) > 9)
    assert counts() == expected


def test_more_states_than_the_tables_are_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block in a state of its own: rebuilding the tables would free nothing."""
    monkeypatch.setattr("uvm_kv.runner.sim.uvm.driver.MAX_KNOWN_STATES", 5)
    driver = UvmDriver(100, 40)
    for block in range(100):
        driver.do([block], Access(run_of(block, 7)))
    stream(driver, range(100))
    driver.check_integrity()


def test_events_add_up_to_the_totals() -> None:
    driver = touched_by_cpu(5, 2)
    start = np.array(driver.totals())
    events = [stream(driver, range(5)), driver.prefetch(range(5), Location.DEVICE), stream(driver, range(5), True)]
    assert sum(np.array(event) for event in events).tolist() == (np.array(driver.totals()) - start).tolist()


def test_evicting_an_unused_chunk_costs_nothing() -> None:
    driver = touched_by_cpu(2, 1)
    stream(driver, [0])
    driver.prefetch(range(1), Location.HOST)
    assert driver.num_chunks == 1
    assert stream(driver, [1]).evicted_chunks == 0
    assert apply(BlockState(), Evict(), Rules()).counts == Counts()
    assert apply(BlockState(), Discard(), Rules()).state == BlockState()
    assert apply(BlockState(), Prefetch(Location.DEVICE), Rules()).state.gpu == FULL


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: Rules(prefetch_threshold_percent=101), "prefetch_threshold_percent=101"),
        (lambda: Rules(prefetch_threshold_percent=0), "prefetch_threshold_percent=0"),
        (lambda: Rules(prefetcher="forest"), "prefetcher=forest; allowed are tree, none, block"),  # type: ignore[arg-type]
        (lambda: UvmDriver(4, 0), "at least one"),
        (lambda: UvmDriver(0, 4), "0 blocks"),
        (lambda: UvmDriver(5, 4, concurrent_managed_access=False), "concurrent_managed_access=false"),
        (lambda: UvmDriver(4, 4).blocks(4096, CHUNK_BYTES), "misaligned"),
        (lambda: UvmDriver(4, 4).blocks(0, CHUNK_BYTES + 1), "misaligned"),
        (lambda: UvmDriver(4, 4).blocks(0, 5 * CHUNK_BYTES), "is not managed"),
        (lambda: UvmDriver(4, 4).blocks(-CHUNK_BYTES, CHUNK_BYTES), "is not managed"),
    ],
)
def test_impossible_parameters_are_refused(build: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build()


def test_without_concurrent_access_what_fits_is_served() -> None:
    driver = UvmDriver(4, 4, concurrent_managed_access=False)
    assert driver.blocks(CHUNK_BYTES, 2 * CHUNK_BYTES) == range(1, 3)
