"""Hints on parts of a managed slab. `parts` are what `SlabLayout.ranges(blocks, layers=...)` gives, or (offset, bytes).

Every argument is checked before the first driver call; state is read back from the driver (`query`), never mirrored.
None of these can be captured into a CUDA graph: a capturing stream is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from uvm_kv.memory.extension import extension
from uvm_kv.memory.slab import Slab
from uvm_kv.memory.streams import stream_handle

PAGE_BYTES = 4096


class Advice(IntEnum):
    """cudaMemoryAdvise."""

    SET_READ_MOSTLY = 1
    UNSET_READ_MOSTLY = 2
    SET_PREFERRED_LOCATION = 3
    UNSET_PREFERRED_LOCATION = 4
    SET_ACCESSED_BY = 5
    UNSET_ACCESSED_BY = 6


class Place(NamedTuple):
    """cudaMemLocation: type 1 is a device, 2 the host, 3 a NUMA node of it; 0 in an answer is none, or mixed."""

    type: int
    id: int


def device_place(device: int = 0) -> Place:
    return Place(1, device)


def host_place() -> Place:
    return Place(2, 0)


def numa_place(node: int) -> Place:
    return Place(3, node)


class RangeState(NamedTuple):
    read_mostly: bool
    preferred: Place
    last_prefetch: Place
    accessed_by: tuple[int, ...]
    """Device ordinals; -1 is the CPU."""


Parts = Any
"""The extension's Ranges, or a sequence of (offset, bytes)."""


def ranges_of(parts: Parts) -> Any:
    return extension().Ranges(list(parts)) if isinstance(parts, Sequence) else parts


def advise(slab: Slab, parts: Parts, advice: Advice, place: Place, *, stream: object) -> None:
    """`place` says for whom or where; read-mostly and the unsetting of a preferred location ignore it.

    Accessed-by takes a device or the host. `stream` is asked only whether it is capturing: advice holds from now on.
    """
    extension().advise(slab.raw, ranges_of(parts), int(advice), tuple(place), stream=stream_handle(stream))


def prefetch(slab: Slab, parts: Parts, to: Place, *, stream: object) -> None:
    """Issue one driver call per part."""
    extension().prefetch(slab.raw, ranges_of(parts), tuple(to), stream=stream_handle(stream))


def prefetch_batch(slab: Slab, parts: Parts, to: Place, *, stream: object) -> None:
    """Issue one driver call for all parts. MissingCapabilityError where the driver does not support that."""
    extension().prefetch_batch(slab.raw, ranges_of(parts), tuple(to), stream=stream_handle(stream))


def discard(slab: Slab, parts: Parts, *, stream: object) -> None:
    """Declare the bytes dead, whole pages only. Write or prefetch them before the next read."""
    extension().discard(slab.raw, ranges_of(parts), stream=stream_handle(stream))


def discard_and_prefetch(slab: Slab, parts: Parts, to: Place, *, stream: object) -> None:
    """Make room at `to` without moving the dead bytes there."""
    extension().discard_and_prefetch(slab.raw, ranges_of(parts), tuple(to), stream=stream_handle(stream))


def query(slab: Slab, *, offset: int = 0, num_bytes: int | None = None) -> RangeState:
    """What the driver says of a range. There is no attribute for where its pages lie now."""
    length = slab.num_bytes - offset if num_bytes is None else num_bytes
    state = extension().query(slab.raw, offset=offset, num_bytes=length)
    places = Place(*state.preferred), Place(*state.last_prefetch)
    return RangeState(state.read_mostly, *places, tuple(state.accessed_by))


def whole_pages(parts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The whole pages inside (offset, bytes) parts: what a discard may drop without dropping a neighbour's bytes."""
    inside = []
    for offset, num_bytes in parts:
        begin, end = -(-offset // PAGE_BYTES) * PAGE_BYTES, (offset + num_bytes) // PAGE_BYTES * PAGE_BYTES
        if begin < end:
            inside.append((begin, end - begin))
    return inside
