"""HardwareProfile: the figures of one card, each with its unit in its name and its source beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from math import isfinite

from uvm_kv.types import GIB


@dataclass(frozen=True)
class Gpu:
    memory_bytes: int
    hbm_gb_per_s: float
    hbm_efficiency: float
    """Share of `hbm_gb_per_s` that streaming reads reach; decode attention and staged copies run at this rate."""
    tensor_tflop_per_s: float
    """Dense half-precision peak with float32 accumulation."""
    tensor_int8_top_per_s: float
    """Dense int8 peak."""
    context_bytes: int
    """CUDA context and libraries, taken before anything is allocated."""
    float32_tflop_per_s: float | None = None
    """Peak of the plain cores; the rates of the tensor cores do not determine it. None: not known, and float32 is
    refused."""

    @property
    def hbm_bytes_per_s(self) -> float:
        return self.hbm_gb_per_s * 1e9 * self.hbm_efficiency


@dataclass(frozen=True)
class Link:
    h2d_gb_per_s: float
    d2h_gb_per_s: float
    duplex_h2d: float
    duplex_d2h: float
    """Share of the solo rate that is left while both directions are busy."""
    zero_copy_gib: tuple[float, ...]
    zero_copy_share: tuple[float, ...]
    """Zero-copy reads as a share of `h2d_gb_per_s`, by footprint read in a step; linear in between."""
    prefetch_share: float
    """cudaMemPrefetchAsync as a share of a pinned copy."""
    pageable_share: float
    """A copy from or to pageable memory, which the driver stages through pinned buffers, as a share of a pinned one."""
    copy_call_us: float
    prefetch_call_us: float
    prefetch_chunk_us: float

    @property
    def h2d_bytes_per_s(self) -> float:
        return self.h2d_gb_per_s * 1e9

    @property
    def d2h_bytes_per_s(self) -> float:
        return self.d2h_gb_per_s * 1e9

    def zero_copy_bytes_per_s(self, footprint_bytes: float) -> float:
        x = footprint_bytes / GIB
        xs, ys = self.zero_copy_gib, self.zero_copy_share
        if x <= xs[0]:
            return self.h2d_bytes_per_s * ys[0]
        for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:], strict=False):
            if x <= x1:
                return self.h2d_bytes_per_s * (y0 + (y1 - y0) * (x - x0) / (x1 - x0))
        return self.h2d_bytes_per_s * ys[-1]


@dataclass(frozen=True)
class ManagedDriver:
    """Costs of the Unified-Memory driver, and how many faults a streaming kernel has in flight."""

    stream_fault_pages: int
    """Pages of 4 KiB that fault together while a kernel streams through memory."""
    fault_batch_us: float
    """A batch of faults: interrupt, fetch, flush, replay."""
    fault_block_us: float
    """A block of 2 MiB served within a batch, besides its copy."""
    cpu_mapped_page_us: float
    """A page that the CPU had mapped, when it first leaves: its mapping is torn down."""
    scattered_page_us: float
    """A page that is copied from a block of which the CPU holds no single 2 MiB chunk: one copy method each."""
    evict_fixed_us: float
    """An evicted chunk, besides its copy."""
    prefetch_overlap: float
    """Share of the shorter direction that overlaps with the longer one when a prefetch evicts."""


@dataclass(frozen=True)
class Power:
    idle_w: float
    active_w: float
    waiting_w: float


@dataclass(frozen=True)
class OperatorCost:
    """time = overhead + (compute**k + memory**k)**(1/k): a roofline whose corner is rounded by the knee k."""

    overhead_us: float
    compute_efficiency: float
    memory_efficiency: float
    knee: float


MAX_FAULT_BATCH = 256
"""uvm_perf_fault_batch_count of the driver."""


@dataclass(frozen=True)
class HardwareProfile:
    name: str
    gpu: Gpu
    link: Link
    managed: ManagedDriver
    power: Power
    operators: Mapping[str, OperatorCost]
    sources: Mapping[str, str]
    """Dotted path of a quantity, or of a group of quantities, to where the number comes from."""

    def source_of(self, path: str) -> str:
        """The most specific source that covers the quantity at a dotted path."""
        return self.sources[max((k for k in self.sources if path == k or path.startswith(k + ".")), key=len)]

    def __post_init__(self) -> None:
        for path, value in _quantities(self):
            covering = [key for key in self.sources if path == key or path.startswith(key + ".")]
            if not covering or not self.sources[max(covering, key=len)].strip():
                raise ValueError(f"hardware.{path} has no source; add it under hardware.sources")
            numbers = value if isinstance(value, tuple) else (value,)
            zero_ok = path.endswith(("_us", "_overlap")) or path == "gpu.context_bytes"
            if not numbers or not all(isfinite(n) and (n > 0 or (n == 0 and zero_ok)) for n in numbers):
                allowed = "zero or a positive number" if zero_ok else "a positive number"
                raise ValueError(f"hardware.{path}={value}; it must be {allowed}")
            is_share = path.endswith(("_share", "_efficiency", "_overlap")) or path.startswith("link.duplex")
            if is_share and any(n > 1 for n in numbers):
                raise ValueError(f"hardware.{path}={value}; a share lies between 0 and 1")
        if self.managed.stream_fault_pages > MAX_FAULT_BATCH:
            raise ValueError(
                f"hardware.managed.stream_fault_pages={self.managed.stream_fault_pages}; the driver fetches at most "
                f"{MAX_FAULT_BATCH} faults at once"
            )
        xs, ys = self.link.zero_copy_gib, self.link.zero_copy_share
        if len(xs) != len(ys) or list(xs) != sorted(set(xs)):
            raise ValueError(
                f"hardware.link.zero_copy_gib={list(xs)} must rise and be as long as zero_copy_share={list(ys)}"
            )


def _quantities(node: object, prefix: str = "") -> list[tuple[str, float | tuple[float, ...]]]:
    if isinstance(node, Mapping):
        items = [(str(k), v) for k, v in node.items()]
    elif is_dataclass(node):
        items = [(f.name, getattr(node, f.name)) for f in fields(node) if f.name not in ("name", "sources")]
    else:
        return [(prefix.rstrip("."), node)]  # type: ignore[list-item]
    return [q for key, value in items if value is not None for q in _quantities(value, f"{prefix}{key}.")]
