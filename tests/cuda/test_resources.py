"""One suite over every memory resource: alignment, properties, bytes that come back, views, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.cuda.slabs import MAKERS, POISON, SLAB_BYTES, get, put, random_bytes
from uvm_kv.memory import Slab, extension, managed_bytes_held
from uvm_kv.memory.slab import managed_booking
from uvm_kv.types import CHUNK_BYTES, MIB

PROPERTIES = {  # host accessible, device accessible, managed
    "device": (False, True, False),
    "pinned": (True, True, False),
    "pinned_any_node": (True, True, False),
    "managed": (True, True, True),
    "vmm_both": (False, True, False),
    "vmm_host": (True, True, False),
    "vmm_device": (False, True, False),
    "vmm_any_node": (False, True, False),
    "counted": (False, True, False),
}


@pytest.fixture(params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def slab(name: str) -> Iterator[Slab]:
    with MAKERS[name]() as made:
        yield made


@pytest.fixture
def staging() -> Iterator[Slab]:
    with Slab.pinned(4 * SLAB_BYTES) as made:
        yield made


def test_aligned_and_as_large_as_asked(slab: Slab) -> None:
    assert slab.address % CHUNK_BYTES == 0
    assert slab.num_bytes >= SLAB_BYTES


def test_properties(name: str, slab: Slab) -> None:
    raw = slab.raw
    assert (raw.host_accessible, raw.device_accessible, raw.managed) == PROPERTIES[name]
    assert (slab.host_offset == 0) is raw.host_accessible


def test_bytes_come_back(slab: Slab, stream: Any, staging: Slab) -> None:
    slab.fill(POISON, stream=stream)
    assert (get(slab, slab.num_bytes, stream, staging) == POISON).all()
    data = random_bytes(slab.num_bytes, seed=1)
    put(slab, data, stream, staging)
    np.testing.assert_array_equal(get(slab, slab.num_bytes, stream, staging), data)


def test_kernels_reach_every_byte(slab: Slab, stream: Any, staging: Slab) -> None:
    """Written by multiprocessors through the slab's one pointer, read back by a copy engine."""
    c = extension()
    data = random_bytes(slab.num_bytes, seed=2)
    staging.host_view(offset=0, num_bytes=data.size)[:] = data
    size = slab.num_bytes // 64
    layout = c.SlabLayout(
        num_blocks=64,
        num_layers=1,
        layer_block_bytes=size,
        layer_major=True,
        pieces_per_group=64,
        group_bytes=slab.num_bytes,
        base_bytes=0,
    )
    order = [(block, block) for block in range(0, 64, 2)] + [(block, block) for block in range(1, 64, 2)]
    runs = c.copy_runs(source=layout, target=layout, blocks=order, layers=(0, 1))
    c.copy(source=staging.raw, target=slab.raw, runs=runs, method=3, stream=stream.handle)
    stream.synchronize()
    np.testing.assert_array_equal(get(slab, slab.num_bytes, stream, staging), data)


def test_the_cpu_sees_what_the_device_wrote_where_it_may(slab: Slab, stream: Any) -> None:
    slab.fill(POISON, stream=stream)
    stream.synchronize()
    begin = slab.host_offset
    if begin < slab.num_bytes:
        view = slab.host_view(offset=begin, num_bytes=slab.num_bytes - begin)
        assert (view == POISON).all()
        view[:] = 7
        assert (view == 7).all()
    if begin > 0:
        with pytest.raises(ValueError, match="the CPU cannot reach offset 0"):
            slab.host_view(offset=0, num_bytes=1)


def test_views_stay_inside(slab: Slab) -> None:
    with pytest.raises(ValueError, match="leaves its slab"):
        slab.view((slab.num_bytes + 1,), "uint8")
    with pytest.raises(ValueError, match="not aligned"):
        slab.view((1,), "float32", offset=2)
    with pytest.raises(ValueError, match="dtype float64"):
        slab.view((1,), "float64")


def test_views_are_plain_cuda_memory(slab: Slab) -> None:
    """kDLCUDA = 2, never 13: torch refuses the managed tag."""
    view = slab.view((4, 16), "float16", offset=64)
    assert view.__dlpack_device__() == (2, 0)
    interface = view.__cuda_array_interface__
    assert interface["data"] == (slab.address + 64, False)
    assert (interface["shape"], interface["typestr"]) == ((4, 16), "<f2")


def test_torch_takes_a_view(slab: Slab, stream: Any) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    slab.fill(POISON, stream=stream)
    stream.synchronize()
    for dtype in ("uint8", "float16", "bfloat16", "float32"):
        tensor = torch.from_dlpack(slab.view((64,), dtype))
        assert (tensor.data_ptr(), str(tensor.dtype)) == (slab.address, f"torch.{dtype}")
    tensor = torch.from_dlpack(slab.view((slab.num_bytes,), "uint8"))
    assert bool((tensor == POISON).all())


@pytest.mark.filterwarnings("default")  # Of cupy's own imports.
def test_cupy_takes_a_view(name: str, slab: Slab) -> None:
    cupy = pytest.importorskip("cupy")
    if name == "vmm_host":
        pytest.skip("CuPy asks for the device of the first byte, and here it lies on none")
    array = cupy.asarray(slab.view((64,), "float32"))
    assert array.data.ptr == slab.address


def test_closing_waits_for_what_still_runs(slab: Slab, stream: Any) -> None:
    for value in range(4):
        slab.fill(value, stream=stream)
    slab.close()
    stream.synchronize()


def test_closed_slabs_say_so(slab: Slab) -> None:
    slab.close()
    slab.close()
    with pytest.raises(ValueError, match="closed"):
        slab.view((1,), "uint8")


def test_views_keep_the_memory_of_a_closed_slab(c: Any) -> None:
    """Freed with the last view, never under one."""
    resource = c.StatisticsResource(c.PinnedResource(device=0, numa_node=-1))
    slab = Slab(resource, 2 * MIB)
    host, device = slab.host_view(offset=0, num_bytes=64), slab.view((64,), "uint8")
    slab.close()
    host[:] = 7
    assert resource.statistics.num_held == 1
    del host
    assert resource.statistics.num_held == 1
    del device
    assert resource.statistics.num_held == 0


def test_views_of_shapes_that_wrap_are_refused(slab: Slab) -> None:
    with pytest.raises(ValueError, match="more bytes than any slab"):
        slab.view((2**62, 4), "float32")


@pytest.mark.parametrize("num_bytes", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES + 4096])
def test_sizes_that_are_no_chunks_are_refused(num_bytes: int) -> None:
    for kind in (Slab.device, Slab.pinned, Slab.managed):
        with pytest.raises(ValueError, match="a positive multiple of 2097152 B"):
            kind(num_bytes)


def test_no_such_device_or_node(c: Any) -> None:
    with pytest.raises(ValueError, match="no device 99"):
        Slab.device(2 * MIB, device=99)
    with pytest.raises(ValueError, match="no NUMA node 512"):
        Slab.pinned(2 * MIB, numa_node=512)


def test_statistics_count_what_went_through(c: Any) -> None:
    resource = c.StatisticsResource(c.DeviceResource(device=0))
    first, second = Slab(resource, 2 * MIB), Slab(resource, 4 * MIB)
    first.close()
    third = Slab(resource, 2 * MIB)
    counts = resource.statistics
    assert (counts.held_bytes, counts.peak_bytes, counts.total_bytes) == (6 * MIB, 6 * MIB, 8 * MIB)
    assert (counts.num_held, counts.num_allocations) == (2, 3)
    second.close()
    third.close()
    assert resource.statistics.held_bytes == 0


def test_more_than_the_card_has_is_out_of_memory(c: Any) -> None:
    asked = (c.total_bytes(0) // CHUNK_BYTES + 512) * CHUNK_BYTES
    with pytest.raises(c.OutOfMemoryError, match=rf"cudaMalloc\(.*{asked} B \(device_resource\.hpp:\d+\)"):
        Slab.device(asked)
    Slab.device(2 * MIB).close()


def test_the_guard_refuses_before_the_driver_is_asked(c: Any) -> None:
    """Nothing of that size is allocated, here or ever: the guard stays on in every test."""
    before = managed_bytes_held()
    asked = (c.free_bytes(0) // CHUNK_BYTES + 1) * CHUNK_BYTES
    with pytest.raises(c.OversubscriptionError, match=f"{asked} B asked exceed"):
        Slab.managed(asked)
    assert managed_bytes_held() == before


def test_the_guard_counts_all_pools_until_they_end(c: Any) -> None:
    before = managed_bytes_held()
    with Slab.managed(4 * MIB), Slab.managed(2 * MIB):
        assert managed_bytes_held() == before + 6 * MIB
        reserve = c.free_bytes(0) - before - 7 * MIB
        with pytest.raises(c.OversubscriptionError, match=f"{before + 6 * MIB} B held"):
            Slab.managed(64 * MIB, reserve_bytes=reserve)
    assert managed_bytes_held() == before


def test_the_guard_counts_what_other_libraries_hold(c: Any) -> None:
    before = managed_bytes_held()
    with managed_booking(6 * MIB):
        assert managed_bytes_held() == before + 6 * MIB
        with pytest.raises(c.OversubscriptionError, match=f"{before + 6 * MIB} B held"):
            Slab.managed(c.free_bytes(0) // CHUNK_BYTES * CHUNK_BYTES)
    assert managed_bytes_held() == before
    with pytest.raises(c.OversubscriptionError), managed_booking(c.total_bytes(0)):
        pass


def test_no_more_pinned_memory_than_the_host_has(c: Any) -> None:
    """Refused before a page is touched: the kernel would end processes to make room."""
    asked = 1 << 50
    with pytest.raises(c.OutOfMemoryError, match=rf"pinned host memory: the host has only \d+ B available, {asked} B"):
        Slab.pinned(asked)
    with pytest.raises(c.OutOfMemoryError, match="the host has only"):
        Slab.vmm(asked, device_bytes=0)


def test_closed_slabs_give_their_memory_back(c: Any) -> None:
    """An eighth of what is free twelve times over: with a leak the last would find no room."""
    part = c.free_bytes(0) // 8 // CHUNK_BYTES * CHUNK_BYTES
    for _ in range(12):
        Slab.device(part).close()
        Slab.vmm(part + 8 * MIB, device_bytes=part).close()
