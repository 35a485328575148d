"""Managed memory as the driver runs it, in 2 MiB chunks: fault service, first-in-first-out eviction, thrashing.

A first version (the exact driver model is an issue of its own). A chunk is nowhere (never touched), on the device or
on the host. Touching a chunk that is not on the device faults: the tree prefetcher brings a sequentially read chunk in
with six services. Where the device is full, each fault evicts the chunk that was faulted in first: the driver sees no
accesses, so being read does not protect a chunk (open-gpu-kernel-modules 595.45.04, uvm_pmm_gpu.c), and a cyclic scan
over more chunks than fit misses on every one. Clean chunks are copied back too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NOWHERE, DEVICE, HOST = 0, 1, 2


class Touched(NamedTuple):
    """What touching a list of chunks did, per segment of the list."""

    first_touches: NDArray[np.int64]
    """Faults on chunks that were nowhere: a new zeroed chunk, no copy."""
    migrations: NDArray[np.int64]
    """Faults on chunks that were on the host: 2 MiB copied in each."""
    evictions: NDArray[np.int64]
    """2 MiB copied out each."""


class ManagedMemory:
    def __init__(self, num_chunks: int, capacity_chunks: int) -> None:
        if capacity_chunks < 1:
            raise ValueError(
                f"the device tier holds {capacity_chunks} chunks of 2 MiB; managed memory needs at least one: "
                f"raise memory.device_kv_bytes"
            )
        self._capacity = capacity_chunks
        self._state = np.zeros(num_chunks, np.int8)
        self._fifo = np.empty(0, np.int64)
        """Chunks on the device, first in first."""
        self._order = np.full(num_chunks, -1, np.int64)
        """Position in `_fifo` of a chunk on the device, -1 elsewhere."""

    @property
    def num_resident(self) -> int:
        return len(self._fifo)

    def touch(self, chunks: NDArray[np.int64], segments: NDArray[np.int64]) -> Touched:
        """Read or write `chunks`, all different, in order; `segments` are the end indices to count by."""
        state = self._state[chunks]
        free = self._capacity - len(self._fifo)
        resident = state == DEVICE
        num_absent = len(chunks) - int(np.count_nonzero(resident))
        if num_absent <= free:
            missed = ~resident
        else:
            # A chunk at position p of the queue is gone after p + 1 evictions, that is before the miss number
            # free + p + 1 has been served; a chunk that is not resident misses at once.
            limit = np.where(resident, self._order[chunks] + free + 1, 0)
            missed = _misses(limit)
        misses = chunks[missed]
        evicted = max(0, len(misses) - free)
        ends = np.concatenate(([0], segments))
        cumulative = np.concatenate(([0], np.cumsum(missed)))[ends]
        first = np.concatenate(([0], np.cumsum(missed & (state == NOWHERE))))[ends]
        evictions = np.maximum(cumulative - free, 0)
        if len(misses):
            # Where more misses than the device holds, the early ones are themselves evicted again.
            queue = np.concatenate((self._fifo, misses))
            out, self._fifo = queue[:evicted], queue[evicted:]
            self._state[out] = HOST
            self._state[self._fifo] = DEVICE
            self._order[out] = -1
            self._order[self._fifo] = np.arange(len(self._fifo))
        first_touches = np.diff(first)
        return Touched(first_touches, np.diff(cumulative) - first_touches, np.diff(evictions))

    def evict(self, chunks: NDArray[np.int64]) -> int:
        """Move chunks to the host by plan; how many of them were on the device."""
        out = chunks[self._state[chunks] == DEVICE]
        if len(out):
            self._state[out] = HOST
            self._order[out] = -1
            self._fifo = self._fifo[self._state[self._fifo] == DEVICE]
            self._order[self._fifo] = np.arange(len(self._fifo))
        return len(out)

    def check_integrity(self) -> None:
        assert len(self._fifo) <= self._capacity, "more chunks resident than fit"
        assert len(np.unique(self._fifo)) == len(self._fifo), "a chunk is resident twice"
        assert np.array_equal(np.sort(self._fifo), np.flatnonzero(self._state == DEVICE))
        assert np.array_equal(self._order[self._fifo], np.arange(len(self._fifo)))


def _misses(limit: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which accesses miss, if access i misses exactly when at least limit[i] misses came before it.

    The recurrence is sequential, but a run of chunks that are read in the order in which they were faulted in hits or
    misses as one: with every access both the limit and, while they miss, the count rise by one. So only the runs are
    walked.
    """
    n = len(limit)
    # Constant along such a run; absent chunks (limit 0) form runs of their own.
    key = np.where(limit > 0, limit - np.arange(n), -n - 1)
    starts = np.concatenate(([0], np.flatnonzero(np.diff(key)) + 1))
    lengths = np.diff(np.append(starts, n))
    count, missed = 0, []
    for first_limit, length in zip(limit[starts].tolist(), lengths.tolist(), strict=True):
        misses = count >= first_limit
        missed.append(misses)
        if misses:
            count += length
    return np.repeat(np.array(missed, np.bool_), lengths)
