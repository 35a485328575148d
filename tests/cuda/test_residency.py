"""Hints on managed memory: what the driver says afterwards, bytes that survive, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.cuda.slabs import POISON, SLAB_BYTES, get, put, random_bytes
from uvm_kv.memory import (
    MemAdvice,
    Place,
    Slab,
    TransferCounters,
    advise,
    device_place,
    discard,
    discard_and_prefetch,
    host_place,
    numa_place,
    prefetch,
    prefetch_batch,
    query,
)
from uvm_kv.memory.counters import unified_memory_trace
from uvm_kv.types import CHUNK_BYTES, MIB

DEVICE, HOST, NONE = device_place(), host_place(), Place(0, 0)
ALL = [(0, SLAB_BYTES)]
HALVES = [(0, SLAB_BYTES // 2), (SLAB_BYTES // 2, SLAB_BYTES // 2)]


@pytest.fixture(autouse=True)
def _managed(_gpu: None, c: Any) -> None:
    if not c.concurrent_managed_access(0):
        pytest.skip("this device has no concurrent managed access")


@pytest.fixture
def slab() -> Iterator[Slab]:
    with Slab.managed(SLAB_BYTES) as made:
        yield made


@pytest.fixture
def staging() -> Iterator[Slab]:
    with Slab.pinned(SLAB_BYTES) as made:
        yield made


def test_a_fresh_slab_has_no_hints(slab: Slab) -> None:
    assert query(slab) == (False, NONE, NONE, ())


@pytest.mark.parametrize("place", [DEVICE, HOST, numa_place(0)])
def test_preferred_location_is_set_and_taken_back(c: Any, slab: Slab, stream: Any, place: Place) -> None:
    if place == numa_place(0) and c.host_numa_node(0) < 0:
        pytest.skip("this system has no NUMA nodes")
    advise(slab, ALL, MemAdvice.SET_PREFERRED_LOCATION, place, stream=stream)
    found = query(slab).preferred
    if place == numa_place(0) and c.num_numa_nodes() == 1 and found == HOST:
        pytest.skip("with one node the driver says host")
    assert found == place
    advise(slab, ALL, MemAdvice.UNSET_PREFERRED_LOCATION, place, stream=stream)
    assert query(slab).preferred == NONE


def test_advice_holds_for_its_range_only(slab: Slab, stream: Any) -> None:
    advise(slab, HALVES[:1], MemAdvice.SET_PREFERRED_LOCATION, DEVICE, stream=stream)
    half = SLAB_BYTES // 2
    assert query(slab, offset=0, num_bytes=half).preferred == DEVICE
    assert query(slab, offset=half, num_bytes=half).preferred == NONE
    assert query(slab).preferred == NONE, "not the same for all pages"


def test_accessed_by_and_read_mostly(slab: Slab, stream: Any) -> None:
    advise(slab, ALL, MemAdvice.SET_ACCESSED_BY, DEVICE, stream=stream)
    assert query(slab).accessed_by == (0,)
    advise(slab, ALL, MemAdvice.SET_ACCESSED_BY, HOST, stream=stream)
    assert sorted(query(slab).accessed_by) == [-1, 0]
    advise(slab, ALL, MemAdvice.UNSET_ACCESSED_BY, HOST, stream=stream)
    advise(slab, ALL, MemAdvice.SET_READ_MOSTLY, DEVICE, stream=stream)
    assert query(slab).read_mostly
    advise(slab, ALL, MemAdvice.UNSET_READ_MOSTLY, DEVICE, stream=stream)
    advise(slab, ALL, MemAdvice.UNSET_ACCESSED_BY, DEVICE, stream=stream)
    assert query(slab)[0] is False
    assert query(slab).accessed_by == ()


@pytest.mark.parametrize("bring", [prefetch, prefetch_batch])
@pytest.mark.parametrize("place", [DEVICE, HOST])
def test_prefetch_is_known_to_the_driver_and_keeps_the_bytes(
    c: Any, slab: Slab, stream: Any, staging: Slab, bring: Any, place: Place
) -> None:
    if bring is prefetch_batch and not c.batch_prefetch():
        pytest.skip("no batched prefetch here")
    data = random_bytes(SLAB_BYTES, seed=1)
    put(slab, data, stream, staging)
    bring(slab, HALVES, place, stream=stream)
    stream.synchronize()
    assert query(slab).last_prefetch == place
    np.testing.assert_array_equal(get(slab, SLAB_BYTES, stream, staging), data)


@pytest.mark.parametrize("batched", [False, True])
def test_prefetches_are_counted(c: Any, slab: Slab, stream: Any, batched: bool) -> None:
    if batched and not c.batch_prefetch():
        pytest.skip("no batched prefetch here")
    counters = TransferCounters()
    slab.fill(POISON, stream=stream)
    counters.prefetch("prefetch", slab, HALVES, HOST, batched=batched, stream=stream)
    total = counters.totals(wait=True)["prefetch"]
    assert total[:2] == (1, SLAB_BYTES)
    assert total.ns > 0
    assert query(slab).last_prefetch == HOST


def test_discard_leaves_the_rest_alone(c: Any, slab: Slab, stream: Any, staging: Slab) -> None:
    if not c.batch_prefetch():
        pytest.skip("no discard here")
    data = random_bytes(SLAB_BYTES, seed=2)
    put(slab, data, stream, staging)
    discard(slab, [(CHUNK_BYTES, CHUNK_BYTES)], stream=stream)
    discard_and_prefetch(slab, [(2 * CHUNK_BYTES, CHUNK_BYTES)], DEVICE, stream=stream)
    slab.fill(POISON, offset=CHUNK_BYTES, num_bytes=2 * CHUNK_BYTES, stream=stream)
    want = data.copy()
    want[CHUNK_BYTES : 3 * CHUNK_BYTES] = POISON
    np.testing.assert_array_equal(get(slab, SLAB_BYTES, stream, staging), want)


def test_a_bad_element_leaves_nothing_half_done(slab: Slab, stream: Any) -> None:
    """The first range is good; the second is not; the driver has heard of neither."""
    for bad in ((SLAB_BYTES, 1), (SLAB_BYTES - 1, 2), (0, 0)):
        with pytest.raises(ValueError, match="range of"):
            advise(slab, [(0, CHUNK_BYTES), bad], MemAdvice.SET_READ_MOSTLY, DEVICE, stream=stream)
        with pytest.raises(ValueError, match="range of"):
            prefetch(slab, [(0, CHUNK_BYTES), bad], DEVICE, stream=stream)
    with pytest.raises(ValueError, match="no ranges"):
        prefetch(slab, [], DEVICE, stream=stream)
    assert query(slab) == (False, NONE, NONE, ())
    assert not query(slab, offset=0, num_bytes=CHUNK_BYTES).read_mostly


def test_what_is_refused(slab: Slab, stream: Any, c: Any) -> None:
    with pytest.raises(ValueError, match="advice 9"):
        c.advise(slab.raw, c.Ranges(ALL), 9, DEVICE, stream=stream.handle)
    with pytest.raises(ValueError, match="there are"):
        prefetch(slab, ALL, device_place(99), stream=stream)
    with pytest.raises(ValueError, match="not a NUMA node"):
        advise(slab, ALL, MemAdvice.SET_ACCESSED_BY, numa_place(0), stream=stream)
    with pytest.raises(ValueError, match="legacy default stream"):
        prefetch(slab, ALL, DEVICE, stream=0)
    with pytest.raises(ValueError, match="cuts a page"):
        discard(slab, [(100, 4096)], stream=stream)
    with Slab.device(2 * MIB) as plain, pytest.raises(ValueError, match="this slab is device"):
        prefetch(plain, [(0, 4096)], DEVICE, stream=stream)


@pytest.mark.parametrize("what", ["advise", "prefetch", "prefetch_batch", "discard", "discard_and_prefetch"])
def test_a_capturing_stream_is_refused(c: Any, slab: Slab, stream: Any, what: str) -> None:
    calls = {
        "advise": lambda: advise(slab, ALL, MemAdvice.SET_READ_MOSTLY, DEVICE, stream=stream),
        "prefetch": lambda: prefetch(slab, ALL, DEVICE, stream=stream),
        "prefetch_batch": lambda: prefetch_batch(slab, ALL, DEVICE, stream=stream),
        "discard": lambda: discard(slab, ALL, stream=stream),
        "discard_and_prefetch": lambda: discard_and_prefetch(slab, ALL, DEVICE, stream=stream),
    }
    stream.begin_capture()
    try:
        with pytest.raises(c.CapturingStreamError, match="cannot be captured"):
            calls[what]()
    finally:
        graph = stream.end_capture()
    assert graph.num_nodes == 0
    assert query(slab) == (False, NONE, NONE, ())


@pytest.mark.filterwarnings("default")  # Of cupti's own imports.
def test_migrated_bytes_are_counted_where_cupti_can(c: Any, stream: Any) -> None:
    with unified_memory_trace() as trace:
        if trace is None:
            pytest.skip("CUPTI does not count Unified Memory here")
        with Slab.managed(SLAB_BYTES) as slab:
            slab.host_view(offset=0, num_bytes=SLAB_BYTES)[:] = 1
            prefetch(slab, ALL, DEVICE, stream=stream)
            counters = trace.counters(synchronize=stream.synchronize)
    if not counters.h2d_bytes:
        pytest.skip("CUPTI starts here and sends no records")
    assert sum(counters.h2d_bytes.values()) >= SLAB_BYTES
