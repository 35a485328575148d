"""Copies of blocks between slabs: lists of blocks become runs, runs one batch or one kernel, on the stream given."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from uvm_kv.memory.extension import extension
from uvm_kv.memory.residency import Parts, Place, ranges_of
from uvm_kv.memory.slab import Slab
from uvm_kv.memory.streams import new_event, new_stream, stream_handle

Pairs = Sequence[tuple[int, int]]
"""(block of the source, block of the target)."""


class CopyMethod(IntEnum):
    AUTOMATIC = 0
    """KERNEL for short runs, BATCH for long ones where the driver has it, else EACH."""
    BATCH = 1
    """cudaMemcpyBatchAsync; cannot be captured into a graph."""
    EACH = 2
    """One cudaMemcpyAsync a run."""
    KERNEL = 3
    """Gather and scatter by the multiprocessors."""


class Placed(NamedTuple):
    """A slab and where blocks lie in it."""

    slab: Slab
    layout: Any


def runs_between(source: Placed, target: Placed, blocks: Pairs, layers: tuple[int, int] | None = None) -> Any:
    """Runs of bytes for `blocks` in layers [first, last), by default all."""
    every = (0, source.layout.num_layers)
    return extension().copy_runs(source=source.layout, target=target.layout, blocks=blocks, layers=layers or every)


def copy_blocks(
    source: Placed,
    target: Placed,
    blocks: Pairs,
    *,
    layers: tuple[int, int] | None = None,
    method: CopyMethod = CopyMethod.AUTOMATIC,
    stream: object,
) -> CopyMethod:
    """Enqueues the copies, which have no order among themselves, and says which method was used."""
    runs = runs_between(source, target, blocks, layers)
    slabs = {"source": source.slab.raw, "target": target.slab.raw}
    return CopyMethod(extension().copy(**slabs, runs=runs, method=int(method), stream=stream_handle(stream)))


class TransferTotals(NamedTuple):
    num_calls: int
    num_bytes: int
    ns: int
    """Device time, summed over calls: two streams at once count twice."""


class TransferCounters:
    """Bytes and time of our own transfers, by CUDA events around each call."""

    def __init__(self) -> None:
        self._raw = extension().TransferCounters()

    def copy_blocks(
        self,
        label: str,
        source: Placed,
        target: Placed,
        blocks: Pairs,
        *,
        layers: tuple[int, int] | None = None,
        method: CopyMethod = CopyMethod.AUTOMATIC,
        stream: object,
    ) -> CopyMethod:
        """As the function of that name, and counted under `label`."""
        runs = runs_between(source, target, blocks, layers)
        slabs = {"source": source.slab.raw, "target": target.slab.raw}
        used = self._raw.copy(label, **slabs, runs=runs, method=int(method), stream=stream_handle(stream))
        return CopyMethod(used)

    def prefetch(self, label: str, slab: Slab, parts: Parts, to: Place, *, batched: bool, stream: object) -> None:
        """As `prefetch` or `prefetch_batch`, and counted under `label`: the bytes asked for, moved or already there."""
        where = {"slab": slab.raw, "ranges": ranges_of(parts), "to": tuple(to)}
        self._raw.prefetch(label, **where, batched=batched, stream=stream_handle(stream))

    def totals(self, *, wait: bool) -> dict[str, TransferTotals]:
        """Of transfers that have ended; `wait` for those that have not."""
        found = self._raw.totals(wait=wait)
        return {label: TransferTotals(total.num_calls, total.num_bytes, total.ns) for label, total in found.items()}


class TwoWayCopies:
    """Both directions at once, on two streams of their own; each call waits for `after` and returns an event."""

    def __init__(self, device: Placed, host: Placed) -> None:
        self.device, self.host = device, host
        self.in_stream, self.out_stream = new_stream(), new_stream()
        self.counters = TransferCounters()

    def copy_in(self, blocks: Pairs, *, layers: tuple[int, int] | None = None, after: Any = None) -> Any:
        """(host block, device block) pairs."""
        return self._go("h2d", self.host, self.device, blocks, layers, after, self.in_stream)

    def copy_out(self, blocks: Pairs, *, layers: tuple[int, int] | None = None, after: Any = None) -> Any:
        """(device block, host block) pairs."""
        return self._go("d2h", self.device, self.host, blocks, layers, after, self.out_stream)

    def _go(
        self,
        label: str,
        source: Placed,
        target: Placed,
        blocks: Pairs,
        layers: tuple[int, int] | None,
        after: Any,
        stream: Any,
    ) -> Any:
        if after is not None:
            after.wait(stream=stream.handle)
        self.counters.copy_blocks(label, source, target, blocks, layers=layers, stream=stream)
        done = new_event()
        done.record(stream=stream.handle)
        return done
