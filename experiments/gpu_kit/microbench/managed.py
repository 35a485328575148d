"""Managed memory that the CPU has written, with a known sum, in either of the two states that its pages come in."""

from __future__ import annotations

import numpy as np

from experiments.gpu_kit.microbench.bench import Array, Bench, Memory, WrongResultError
from uvm_kv.memory import Slab, probes
from uvm_kv.memory.residency import host_place, prefetch
from uvm_kv.types import CHUNK_BYTES

TOUCHED, CHUNKED = "touched", "chunked"
"""touched: the CPU wrote pages that nobody had, so that they are small ones, scattered. chunked: the driver made whole
chunks on the host first (by a prefetch to it), as an eviction does."""
STATES = (CHUNKED, TOUCHED)


def tile(seed: int = 1) -> Array:
    """2 MiB of random words below 2**31, so that adding one never wraps."""
    return np.random.default_rng(seed).integers(0, 1 << 31, CHUNK_BYTES // 4, dtype=np.uint32)


def tiles_sum(pattern: Array, num_bytes: int, added: int = 0) -> int:
    """Sum of the words of `num_bytes` of tiles, `added` to each, as the read probe gives it."""
    num_words = num_bytes // 4
    return (int(pattern.sum(dtype=np.uint64)) * (num_bytes // CHUNK_BYTES) + added * num_words) % (1 << 64)


def write(view: Array, pattern: Array) -> None:
    """The CPU writes the pattern over all of a uint8 view."""
    view.view(np.uint32).reshape(-1, pattern.size)[:] = pattern


def written_slab(bench: Bench, memory: Memory, num_bytes: int, state: str, pattern: Array) -> Slab:
    slab = memory.managed(num_bytes)
    if state == CHUNKED:
        to_host(bench, slab)
    write(slab.host_view(offset=0, num_bytes=num_bytes), pattern)
    return slab


def to_host(bench: Bench, slab: Slab) -> None:
    prefetch(slab, [(0, slab.num_bytes)], host_place(), stream=bench.stream)
    bench.stream.synchronize()


def check_sum(bench: Bench, slab: Slab, num_bytes: int, expected: int, total: Slab) -> None:
    """Read by the device."""
    found = bench.checksum(probes.span(slab, num_bytes=num_bytes), total)
    if found != expected:
        raise WrongResultError(f"managed memory holds {found} in all where {expected} was written")
