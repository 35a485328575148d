"""What the driver says of this device, against what it then does."""

from __future__ import annotations

from typing import Any

import pytest

from uvm_kv.cli.cuda_report import kernels_for
from uvm_kv.memory import Slab, build_info, capabilities
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


def test_the_meter_reads_what_it_can(c: Any) -> None:
    with Nvml.opened(c.pci_bus_id(0)) as meter:
        if meter is None:
            pytest.skip("no NVML here, or it does not know this card")
        reading = meter.read()
        assert reading.energy_j is None or reading.energy_j > 0
        assert reading.power_w is None or 0 < reading.power_w < 2000
        now, most = meter.pcie_link(), meter.pcie_link(maximum=True)
    if None not in (*now, *most):
        assert 1 <= now[0] <= most[0] <= 7
        assert now[1] <= most[1]


def test_the_kernels_run_here(c: Any) -> None:
    """What the doctor says of the build, on this card."""
    arch = c.compute_capability(0)
    assert kernels_for(build_info().architectures, f"{arch // 10}.{arch % 10}") is not None
