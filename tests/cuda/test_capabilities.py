"""What the driver says of this device, against what it then does."""

from __future__ import annotations

from typing import Any

from uvm_kv.memory import Slab, capabilities
from uvm_kv.memory.counters import Nvml
from uvm_kv.types import MIB


def test_every_capability_has_an_answer(c: Any) -> None:
    found = capabilities()
    assert found.name
    assert float(found.compute_capability) >= 7.5
    assert 0 < found.free_bytes <= found.total_bytes
    assert found.host_numa_node >= -1
    assert c.driver_version() >= 13000


def test_what_it_says_it_can_it_can() -> None:
    found = capabilities()
    if found.concurrent_managed_access:
        Slab.managed(2 * MIB).close()
    if found.virtual_memory_management and found.host_virtual_memory:
        Slab.vmm(8 * MIB, device_bytes=4 * MIB).close()
    if found.mapped_host_memory:
        Slab.pinned(2 * MIB).close()


def test_the_meter_reads_what_it_can() -> None:
    meter = Nvml.open()
    if meter is not None:
        reading = meter.read()
        assert reading.energy_j is None or reading.energy_j > 0
        assert reading.power_w is None or 0 < reading.power_w < 2000
        meter.close()
