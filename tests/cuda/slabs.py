"""Slabs of every kind, by name: registering one here puts it under the whole conformance suite.

All are small: the tests together must stay under 24 GB of managed memory and under half of what is free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from uvm_kv.memory import Slab, extension
from uvm_kv.types import MIB

SLAB_BYTES = 8 * MIB
POISON = 0xA5

Make = Callable[[], Slab]


def _vmm(device_bytes: int) -> Slab:
    """Rounded up to the device's granularity, where that is more than 2 MiB."""
    c = extension()
    node = max(0, c.host_numa_node(0))
    unit = c.VmmResource(device=0, device_bytes=0, numa_node=node).granularity
    up = -(-device_bytes // unit) * unit
    return Slab.vmm(max(SLAB_BYTES, up + unit) if device_bytes < SLAB_BYTES else up, device_bytes=up)


def _vmm_any_node() -> Slab:
    if not extension().host_virtual_memory_of_any_node(0):
        pytest.skip("no virtual memory management of host memory without a node")
    return Slab.vmm(SLAB_BYTES, device_bytes=SLAB_BYTES // 2, numa_node=-1)


def _counted() -> Slab:
    c = extension()
    return Slab(c.StatisticsResource(c.DeviceResource(device=0)), SLAB_BYTES)


MAKERS: dict[str, Make] = {
    "device": lambda: Slab.device(SLAB_BYTES),
    "pinned": lambda: Slab.pinned(SLAB_BYTES),
    "pinned_any_node": lambda: Slab.pinned(SLAB_BYTES, numa_node=-1),
    "managed": lambda: Slab.managed(SLAB_BYTES),
    "vmm_both": lambda: _vmm(SLAB_BYTES // 2),
    "vmm_host": lambda: _vmm(0),
    "vmm_device": lambda: _vmm(SLAB_BYTES),
    "vmm_any_node": _vmm_any_node,
    "counted": _counted,
}


def random_bytes(num_bytes: int, seed: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


def whole(slab: Slab, other: Slab, num_bytes: int) -> Any:
    """The first `num_bytes` of two slabs as one block of one layer."""
    fields = {"num_layers": 1, "layer_block_bytes": num_bytes, "layer_major": True}
    fields |= {"num_blocks": 1, "pieces_per_group": 1, "group_bytes": num_bytes, "base_bytes": 0}
    layout = extension().SlabLayout(**fields)
    assert max(slab.num_bytes, other.num_bytes) >= num_bytes
    return extension().copy_runs(source=layout, target=layout, blocks=[(0, 0)], layers=(0, 1))


def put(slab: Slab, data: npt.NDArray[np.uint8], stream: Any, staging: Slab) -> None:
    """Host bytes into any slab, through pinned memory and a plain copy."""
    staging.host_view(offset=0, num_bytes=data.size)[:] = data
    runs = whole(staging, slab, data.size)
    extension().copy(source=staging.raw, target=slab.raw, runs=runs, method=2, stream=stream.handle)
    stream.synchronize()


def get(slab: Slab, num_bytes: int, stream: Any, staging: Slab) -> npt.NDArray[np.uint8]:
    """The bytes of any slab, through pinned memory that was poisoned before."""
    view = staging.host_view(offset=0, num_bytes=num_bytes)
    view[:] = POISON
    runs = whole(slab, staging, num_bytes)
    extension().copy(source=slab.raw, target=staging.raw, runs=runs, method=2, stream=stream.handle)
    stream.synchronize()
    return view.copy()
