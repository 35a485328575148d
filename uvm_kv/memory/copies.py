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
    """KERNEL for short runs, BATCH for long ones; never EACH."""
    BATCH = 1
    """cudaMemcpyBatchAsync; cannot be captured into a graph."""
    EACH = 2
    """One cudaMemcpyAsync per run."""
    KERNEL = 3
    """Gather and scatter by the multiprocessors."""


class Placed(NamedTuple):
    """A slab and where blocks lie in it."""

    slab: Slab
    layout: Any


def copy_blocks(
    source: Placed,
    target: Placed,
    blocks: Pairs,
    *,
    layers: tuple[int, int] | None = None,
    target_layer: int | None = None,
    method: CopyMethod = CopyMethod.AUTOMATIC,
    stream: object,
) -> CopyMethod:
    """Enqueues copies of `blocks` in layers [first, last), by default all. They have no order among themselves.
    `target_layer`: where the first of them goes in the target, by default the same layer.

    Returns the method that was used. ValueError for blocks or layers outside and for copies that overlap;
    CapturingStreamError and MissingCapabilityError where a batch cannot be.
    """
    return CopyMethod(extension().copy(**_request(source, target, blocks, layers, target_layer, method, stream)))


def _request(
    source: Placed,
    target: Placed,
    blocks: Pairs,
    layers: tuple[int, int] | None,
    target_layer: int | None,
    method: CopyMethod,
    stream: object,
) -> dict[str, Any]:
    layouts = {"source": source.layout, "target": target.layout}
    every = (0, source.layout.num_layers)
    runs = extension().copy_runs(**layouts, blocks=blocks, layers=layers or every, target_layer=target_layer)
    slabs = {"source": source.slab.raw, "target": target.slab.raw}
    return {**slabs, "runs": runs, "method": int(method), "stream": stream_handle(stream)}


class TransferTotals(NamedTuple):
    num_calls: int
    num_bytes: int
    ns: int
    """Device time, summed over calls: two streams at once count twice."""


class TransferCounters:
    """Bytes and time of our own transfers on one device, by CUDA events around each call."""

    def __init__(self, *, device: int = 0) -> None:
        self._raw = extension().TransferCounters(device=device)

    def copy_blocks(
        self,
        label: str,
        source: Placed,
        target: Placed,
        blocks: Pairs,
        *,
        layers: tuple[int, int] | None = None,
        target_layer: int | None = None,
        method: CopyMethod = CopyMethod.AUTOMATIC,
        stream: object,
    ) -> CopyMethod:
        """Call the function of the same name, and count the transfer under `label`."""
        request = _request(source, target, blocks, layers, target_layer, method, stream)
        return CopyMethod(self._raw.copy(label, **request))

    def prefetch(self, label: str, slab: Slab, parts: Parts, to: Place, *, batched: bool, stream: object) -> None:
        """As `prefetch` or `prefetch_batch`, and counted under `label`: the bytes asked for, moved or already there."""
        where = {"slab": slab.raw, "ranges": ranges_of(parts), "to": tuple(to)}
        self._raw.prefetch(label, **where, batched=batched, stream=stream_handle(stream))

    def totals(self, *, wait: bool) -> dict[str, TransferTotals]:
        """Totals by label of the transfers that have ended; with `wait`, of all transfers, after waiting for them."""
        found = self._raw.totals(wait=wait)
        return {label: TransferTotals(total.num_calls, total.num_bytes, total.ns) for label, total in found.items()}


class CopyLane:
    """Copies from one slab to another on a stream of their own, counted under `label`."""

    def __init__(self, label: str, source: Placed, target: Placed, counters: TransferCounters) -> None:
        self.label, self.source, self.target, self.counters = label, source, target, counters
        self.stream = new_stream(device=source.slab.device_ordinal)

    def __call__(self, blocks: Pairs, *, layers: tuple[int, int] | None = None, after: Any = None) -> Any:
        """Copies (source block, target block) pairs once `after` has come; returns the event of their end."""
        if after is not None:
            after.wait(stream=self.stream.handle)
        self.counters.copy_blocks(self.label, self.source, self.target, blocks, layers=layers, stream=self.stream)
        done = new_event(device=self.source.slab.device_ordinal)
        done.record(stream=self.stream.handle)
        return done


class TwoWayCopies:
    """Both directions at once: `copy_in` takes (host, device) pairs of blocks, `copy_out` (device, host) pairs."""

    def __init__(self, device: Placed, host: Placed) -> None:
        self.counters = TransferCounters(device=device.slab.device_ordinal)
        self.copy_in = CopyLane("h2d", host, device, self.counters)
        self.copy_out = CopyLane("d2h", device, host, self.counters)
