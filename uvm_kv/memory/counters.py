"""What the driver and the card count: Unified Memory by CUPTI, power and PCIe by NVML.

Where a counter does not work (no package, no permission, no such counter) it is None, never 0.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

HTOD, DTOH, CPU_FAULTS, GPU_FAULTS, THRASHING, THROTTLING, REMOTE_MAP, DTOD = range(1, 9)
"""CUpti_ActivityUnifiedMemoryCounterKind."""
CAUSES = ("unknown", "user", "coherence", "prefetch", "eviction", "access_counters")
"""CUpti_ActivityUnifiedMemoryMigrationCause: `coherence` is a fault, `prefetch` the driver's own tree prefetcher."""
COUNTED = (HTOD, DTOH, CPU_FAULTS, GPU_FAULTS, THRASHING, THROTTLING, REMOTE_MAP)
BUFFER_BYTES = 8 << 20


class UnifiedMemoryCounters(NamedTuple):
    h2d_bytes: dict[str, int]
    """Bytes by cause."""
    d2h_bytes: dict[str, int]
    gpu_fault_groups: int
    cpu_faults: int
    num_thrashing: int
    num_throttling: int
    remote_mapped_bytes: int


def total(records: Iterable[tuple[int, int, int]]) -> UnifiedMemoryCounters:
    """Sums of (counter kind, value, flags), the three fields of a record that matter here."""
    h2d: dict[str, int] = {}
    d2h: dict[str, int] = {}
    sums = dict.fromkeys((GPU_FAULTS, CPU_FAULTS, THRASHING, THROTTLING, REMOTE_MAP), 0)
    for kind, value, flags in records:
        if kind in (HTOD, DTOH):
            side = h2d if kind == HTOD else d2h
            cause = CAUSES[flags] if flags < len(CAUSES) else CAUSES[0]
            side[cause] = side.get(cause, 0) + value
        elif kind in (GPU_FAULTS, REMOTE_MAP):
            sums[kind] += value
        elif kind in sums:
            sums[kind] += 1  # The value is a program counter or a size here; the record itself is the event.
    return UnifiedMemoryCounters(h2d, d2h, *sums.values())


class UnifiedMemoryTrace:
    """Collected while open. One at a time: CUPTI's callbacks belong to the process."""

    def __init__(self, cupti: Any) -> None:
        self._cupti = cupti
        self._records: list[tuple[int, int, int]] = []

    def counters(self, *, synchronize: Any = None) -> UnifiedMemoryCounters:
        """Counts so far. `synchronize`: called before the buffers are flushed, to wait for the device."""
        if synchronize is not None:
            synchronize()
        self._cupti.activity_flush_all(1)
        return total(self._records)

    def _completed(self, activities: list[Any]) -> None:
        kind = self._cupti.ActivityKind.UNIFIED_MEMORY_COUNTER
        for record in activities:
            if record.kind == kind:
                self._records.append((int(record.counter_kind), int(record.value), int(record.flags_)))


@contextmanager
def unified_memory_trace(device: int = 0) -> Iterator[UnifiedMemoryTrace | None]:
    """None where CUPTI does not count Unified Memory: not installed, no driver, no permission, not this device.

    Open it before the first managed allocation; tracing faults slows them down, so never while timing.
    """
    trace = _start(device)
    try:
        yield trace
    finally:
        if trace is not None:
            cupti = trace._cupti
            cupti.activity_flush_all(1)
            cupti.activity_disable(cupti.ActivityKind.UNIFIED_MEMORY_COUNTER)


def _start(device: int) -> UnifiedMemoryTrace | None:
    try:
        cupti = importlib.import_module("cupti.cupti")
        trace = UnifiedMemoryTrace(cupti)
        config = _config(cupti, device)
        cupti.activity_register_callbacks(lambda: (BUFFER_BYTES, 0), trace._completed)
        cupti.activity_configure_unified_memory_counter(config.ctypes.data, len(config))
        cupti.activity_enable(cupti.ActivityKind.UNIFIED_MEMORY_COUNTER)
    except (ImportError, AttributeError, RuntimeError):  # NotSupportedError, as of a driver, is a RuntimeError;
        return None
    except Exception as error:  # cuptiError, the answer of a CUPTI that refuses, is not.
        if type(error).__name__ != "cuptiError":
            raise
        return None
    return trace


def _config(cupti: Any, device: int) -> Any:
    numpy = importlib.import_module("numpy")
    config = numpy.zeros(len(COUNTED), dtype=cupti.activity_unified_memory_counter_config_dtype)
    config["scope"] = 1  # This process, one device.
    config["kind"] = COUNTED
    config["device_id"] = device
    config["enable"] = 1
    return config


class CardReading(NamedTuple):
    energy_j: float | None
    """Total since the driver was loaded: take differences."""
    power_w: float | None
    pcie_rx_bytes_per_s: int | None
    """Rate into the card over about the last 20 ms: a sample, not an integral."""
    pcie_tx_bytes_per_s: int | None


class Nvml:
    """The card's own meters, by nvidia-ml-py. `open` is None where there is no NVML, or no such card."""

    def __init__(self, module: Any, handle: Any) -> None:
        self._module, self._handle = module, handle

    @classmethod
    def open(cls, bus_id: str) -> Nvml | None:
        """`bus_id` as CUDA gives it (`extension().pci_bus_id(device)`): NVML counts cards in another order."""
        try:
            module = importlib.import_module("pynvml")
        except ImportError:
            return None
        try:
            module.nvmlInit()
        except module.NVMLError:
            return None
        try:
            return cls(module, module.nvmlDeviceGetHandleByPciBusId(bus_id))
        except module.NVMLError:
            module.nvmlShutdown()
            return None

    @classmethod
    @contextmanager
    def opened(cls, bus_id: str) -> Iterator[Nvml | None]:
        meter = cls.open(bus_id)
        try:
            yield meter
        finally:
            if meter is not None:
                meter.close()

    def pcie_link(self, *, maximum: bool = False) -> tuple[int | None, int | None]:
        """(generation, width) now, or at most."""
        which = "Max" if maximum else "Curr"
        generation, width = (self._ask(f"nvmlDeviceGet{which}PcieLink{what}") for what in ("Generation", "Width"))
        return generation or None, width or None

    def energy_j(self) -> float | None:
        """The card's energy counter in joules; None where it has none. The call does not wait for a sampling window."""
        energy = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if energy is None else energy / 1e3

    def read(self) -> CardReading:
        """A sample of the card's meters. It takes about 40 ms, because the two PCIe counters are windows of 20 ms."""
        m = self._module
        power = self._ask("nvmlDeviceGetPowerUsage")
        received = self._ask("nvmlDeviceGetPcieThroughput", getattr(m, "NVML_PCIE_UTIL_RX_BYTES", 1))
        sent = self._ask("nvmlDeviceGetPcieThroughput", getattr(m, "NVML_PCIE_UTIL_TX_BYTES", 0))
        return CardReading(
            self.energy_j(),
            None if power is None else power / 1e3,
            None if received is None else received * 1000,
            None if sent is None else sent * 1000,
        )

    def _ask(self, name: str, *arguments: Any) -> int | None:
        try:
            return int(getattr(self._module, name)(self._handle, *arguments))
        except (AttributeError, self._module.NVMLError):
            return None

    def close(self) -> None:
        self._module.nvmlShutdown()
