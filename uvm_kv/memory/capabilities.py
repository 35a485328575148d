"""What this machine's GPU and driver can do, one predicate each; all of it asked anew, nothing kept."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from uvm_kv.memory.counters import Nvml
from uvm_kv.memory.extension import extension


def num_devices() -> int:
    """Visible devices; 0 where there is no driver. Any other failure, as of a driver too old, is an error."""
    module = extension()
    try:
        return int(module.num_devices())
    except module.CudaError as error:
        if module.driver_version() == 0 or "cudaErrorNoDevice" in str(error):
            return 0
        raise


def driver_version() -> str | None:
    """The newest CUDA that the driver knows, as 13.0; None without a driver."""
    version = extension().driver_version()
    return f"{version // 1000}.{version % 1000 // 10}" if version else None


class PcieLink(NamedTuple):
    """As it runs now: an idle card may show less than under load. None where the system does not say."""

    generation: int | None
    width: int | None


_GENERATION = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}
"""By GT/s, as the kernel prints it."""


def pcie_link(bus_id: str, *, maximum: bool = False) -> PcieLink:
    """The PCIe link of the device at `bus_id` (0000:65:00.0). `maximum`: the fastest link of card and slot, not the
    present one.

    By NVML, which asks the card; where there is none, by the kernel, which in a virtual machine knows its virtual slot.
    """
    with Nvml.opened(bus_id) as meter:
        found = PcieLink(*((None, None) if meter is None else meter.pcie_link(maximum=maximum)))
    return kernel_pcie_link(bus_id, maximum=maximum) if None in found else found


def kernel_pcie_link(bus_id: str, *, devices: Path = Path("/sys/bus/pci/devices"), maximum: bool = False) -> PcieLink:
    """As the kernel says in its file system."""
    folder = devices / bus_id.lower()
    which = "max" if maximum else "current"
    speed, width = (_read(folder / f"{which}_link_{what}") for what in ("speed", "width"))
    generation = _GENERATION.get(speed.split()[0]) if speed else None
    return PcieLink(generation, int(width) if width and width.isdigit() and int(width) > 0 else None)


def _read(file: Path) -> str | None:
    try:
        return file.read_text().strip() or None
    except OSError:
        return None


class Capabilities(NamedTuple):
    name: str
    compute_capability: str
    concurrent_managed_access: bool
    """GPU page faults, hints, oversubscription."""
    pageable_memory_access: bool
    """The GPU reads plain malloc memory (HMM or ATS)."""
    mapped_host_memory: bool
    virtual_memory_management: bool
    host_virtual_memory: bool
    """Whether host memory of a NUMA node can be mapped, which `Slab.vmm` needs by default."""
    batch_copy: bool
    batch_prefetch: bool
    host_numa_node: int
    """-1 where the system has no NUMA."""
    free_bytes: int
    total_bytes: int
    link: PcieLink
    max_link: PcieLink


def capabilities(device: int = 0) -> Capabilities:
    """Asks the driver; makes a context on the device."""
    c = extension()
    bus_id, arch = c.pci_bus_id(device), c.compute_capability(device)
    return Capabilities(
        c.device_name(device),
        f"{arch // 10}.{arch % 10}",
        c.concurrent_managed_access(device),
        c.pageable_memory_access(device),
        c.mapped_host_memory(device),
        c.virtual_memory_management(device),
        c.host_virtual_memory(device),
        c.batch_copy(),
        c.batch_prefetch(),
        c.host_numa_node(device),
        c.free_bytes(device),
        c.total_bytes(device),
        pcie_link(bus_id),
        pcie_link(bus_id, maximum=True),
    )
