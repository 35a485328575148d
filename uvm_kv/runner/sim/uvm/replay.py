"""Replay of a published study of Unified Memory: kernels pass over two halves of a working set, and each pass is timed.

The study (facts of an A30): a working set of `working_set_ratio * capacity_bytes` in two equal allocations A and B,
initialised on the CPU; a grid-stride kernel adds one to every element of a half; passes A, B, A, B.
Halves are rounded up to whole blocks of 2 MiB.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isfinite
from typing import Any

import numpy as np

from uvm_kv.hw.profile import HardwareProfile
from uvm_kv.runner.sim.uvm.block import (
    BLOCK_PAGES,
    FULL,
    NO_ADVICE,
    PAGE_BYTES,
    Access,
    Counts,
    CpuAccess,
    Location,
    Policy,
    Rules,
    add,
)
from uvm_kv.runner.sim.uvm.cost import fault_s, prefetch_s, remote_s
from uvm_kv.runner.sim.uvm.driver import UvmDriver
from uvm_kv.types import CHUNK_BYTES

ADVICE = {
    "none": NO_ADVICE,
    "preferred_device": Policy(Location.DEVICE),
    "preferred_host": Policy(Location.HOST),
    "accessed_by": Policy(accessed_by=True),
    "preferred_host_accessed_by": Policy(Location.HOST, accessed_by=True),
    "preferred_device_accessed_by": Policy(Location.DEVICE, accessed_by=True),
    "read_mostly": Policy(read_mostly=True),
}
ACCESS = ("stream", "random")
OPERATIONS = ("update", "read")
INITIAL_LOCATIONS = ("host", "none", "device")
MAX_CHUNKS = 1 << 22
"""8 TiB of managed memory, so that a mistyped size is refused before it is allocated for."""


@dataclass(frozen=True)
class Study:
    capacity_bytes: int
    """Device memory that managed allocations can get."""
    working_set_ratio: float
    """Bytes of both halves over `capacity_bytes`."""
    passes: tuple[str, ...] = ("A", "B", "A", "B")
    access: str = "stream"
    """random: every page of the half once, in an order drawn anew each pass."""
    operation: str = "update"
    """update: read and write each element; read: read it."""
    advice: str = "none"
    prefetch: bool = False
    """cudaMemPrefetchAsync of the half, in one call, before each pass."""
    initial_location: str = "host"
    """none: never touched; device: written by the GPU, A and then B."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.capacity_bytes < CHUNK_BYTES:
            raise ValueError(
                f"capacity_bytes={self.capacity_bytes}; the card must hold at least one chunk of {CHUNK_BYTES} bytes"
            )
        if not 0 < self.working_set_ratio < float("inf"):
            raise ValueError(f"working_set_ratio={self.working_set_ratio}; it must be a positive number")
        if self.half_bytes < PAGE_BYTES or 2 * self.half_bytes > MAX_CHUNKS * CHUNK_BYTES:
            raise ValueError(
                f"working_set_ratio={self.working_set_ratio} of capacity_bytes={self.capacity_bytes} makes halves of "
                f"{self.half_bytes} bytes; allowed are {PAGE_BYTES} to {MAX_CHUNKS * CHUNK_BYTES // 2}"
            )
        if not self.passes or not set(self.passes) <= {"A", "B"}:
            raise ValueError(f"passes={list(self.passes)}; it is a list of A and B, such as [A,B,A,B]")
        for name, allowed in (
            ("access", ACCESS),
            ("operation", OPERATIONS),
            ("advice", tuple(ADVICE)),
            ("initial_location", INITIAL_LOCATIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)} is unknown; allowed: {', '.join(allowed)}")

    @property
    def half_bytes(self) -> int:
        size = self.working_set_ratio * self.capacity_bytes / 2
        return int(size) if isfinite(size) else 0


@dataclass(frozen=True)
class PassResult:
    name: str
    seconds: float
    counts: Counts
    host_bytes: int
    """Host memory in use after the pass."""

    def to_json(self) -> dict[str, Any]:
        """Bytes are those that migrated; what was read or written in place is counted apart."""
        c = self.counts
        return {
            "name": self.name,
            "milliseconds": self.seconds * 1e3,
            "fault_groups": c.fault_groups,
            "fault_batches": c.fault_batches,
            "service_runs": c.service_runs,
            "migrations": c.migrations,
            "evicted_chunks": c.evicted_chunks,
            "h2d_bytes": (c.h2d_fault_pages + c.h2d_prefetch_pages) * PAGE_BYTES,
            "d2h_bytes": (c.d2h_fault_pages + c.d2h_prefetch_pages + c.d2h_eviction_pages) * PAGE_BYTES,
            "remote_read_bytes": c.remote_read_pages * PAGE_BYTES,
            "remote_write_bytes": c.remote_write_pages * PAGE_BYTES,
            "host_bytes": self.host_bytes,
        }


def run_study(
    study: Study,
    profile: HardwareProfile,
    rules: Rules | None = None,
    *,
    concurrent_managed_access: bool = True,
) -> list[PassResult]:
    """Simulated passes, in order. ValueError for impossible parameters.

    Without concurrent managed access the GPU takes no page faults: all of a half moves before its kernel starts.
    """
    if not concurrent_managed_access and (study.advice != "none" or study.prefetch):
        raise ValueError(
            f"concurrent_managed_access=false (Windows, WSL2) with advice={study.advice}, prefetch={study.prefetch}: "
            f"there cudaMemAdvise and cudaMemPrefetchAsync fail; use advice=none and prefetch=false"
        )
    num_blocks = ceil(study.half_bytes / CHUNK_BYTES)
    halves = {
        "A": np.arange(num_blocks, dtype=np.int32),
        "B": np.arange(num_blocks, 2 * num_blocks, dtype=np.int32),
    }
    driver = UvmDriver(
        2 * num_blocks,
        study.capacity_bytes // CHUNK_BYTES,
        rules,
        concurrent_managed_access=concurrent_managed_access,
    )
    driver.advise(range(2 * num_blocks), ADVICE[study.advice])
    window = profile.managed.stream_fault_pages
    if study.initial_location == "host":
        driver.do(range(2 * num_blocks), CpuAccess(FULL, write=True))
    elif study.initial_location == "device":
        driver.do(range(2 * num_blocks), Access(FULL, True, window))
    rng = np.random.default_rng(study.seed)
    writes = (False, True) if study.operation == "update" else (False,)
    # A kernel goes through a block, reading and then writing it, and on to the next.
    actions = np.tile([driver.action(Access(FULL, write, window)) for write in writes], num_blocks).astype(np.int32)
    results = []
    for name in study.passes:
        blocks = halves[name]
        moved_s = 0.0
        moved = Counts()
        if study.prefetch or not concurrent_managed_access:
            moved = driver.prefetch(range(int(blocks[0]), int(blocks[-1]) + 1), Location.DEVICE)
            if study.prefetch or moved.migrations:
                moved_s = prefetch_s(moved, 1, num_blocks, profile)
        if study.access == "stream":
            counts = driver.run(np.repeat(blocks, len(writes)), actions)
        else:
            counts = driver.gpu_random(blocks[0] * BLOCK_PAGES + rng.permutation(num_blocks * BLOCK_PAGES), writes)
        seconds = moved_s + _pass_s(num_blocks * CHUNK_BYTES, counts, study, profile)
        results.append(PassResult(name, seconds, add(moved, counts), driver.host_bytes))
    return results


def _pass_s(num_bytes: int, counts: Counts, study: Study, profile: HardwareProfile) -> float:
    remote_bytes = max(counts.remote_read_pages, counts.remote_write_pages) * PAGE_BYTES
    local = num_bytes - remote_bytes
    in_hbm = local * (2 if study.operation == "update" else 1) / profile.gpu.hbm_bytes_per_s
    return fault_s(counts, profile) + max(in_hbm, remote_s(counts, profile))
