"""Plain kernels over any memory that the device reaches, for measuring: a streaming read, first touches, random fill.

They take addresses, not slabs, so that other libraries' memory can be measured by the same kernels. A wrong address is
not caught: it is a CUDA error, or another's memory.
"""

from __future__ import annotations

from typing import NamedTuple

from uvm_kv.memory.extension import extension
from uvm_kv.memory.slab import Slab
from uvm_kv.memory.streams import stream_handle

PAGE_BYTES = 4096
WORDS_PER_PAGE = PAGE_BYTES // 4
FILL_KINDS = {"words": 0, "float16": 1, "bfloat16": 2, "float32": 3}


class Span(NamedTuple):
    """Bytes at an address that the device reaches."""

    address: int
    num_bytes: int


def span(slab: Slab, *, offset: int = 0, num_bytes: int | None = None) -> Span:
    """Part of a slab; ValueError where it leaves the slab."""
    length = slab.num_bytes - offset if num_bytes is None else num_bytes
    if offset < 0 or length < 1 or offset + length > slab.num_bytes:
        raise ValueError(f"{length} bytes at offset {offset} of a slab of {slab.num_bytes} bytes")
    return Span(slab.address + offset, length)


def stream_read(what: Span, *, total: Span, stream: object) -> None:
    """Reads every byte once, coalesced, and adds the sum of its 32-bit words to the uint64 at `total` (modulo 2^64)."""
    extension().probe_read(*what, total=total.address, stream=stream_handle(stream))


def add_one(what: Span, *, stream: object) -> None:
    """Adds one to every 32-bit word, grid-stride, in ascending order."""
    extension().probe_add_one(*what, stream=stream_handle(stream))


def add_one_pages(what: Span, order: Span, *, words_per_page: int = WORDS_PER_PAGE, stream: object) -> None:
    """Adds one to the first words of each page of 4 KiB, one thread per page. `order`: uint32 page numbers, each once,
    in memory that the device reaches. `words_per_page` 1 touches each page and no more."""
    if order.num_bytes * WORDS_PER_PAGE != what.num_bytes:
        raise ValueError(f"an order of {order.num_bytes // 4} pages for {what.num_bytes // PAGE_BYTES} pages")
    where = {"order": order.address, "words_per_page": words_per_page}
    extension().probe_add_one_pages(*what, **where, stream=stream_handle(stream))


def fill_random(what: Span, dtype: str, *, seed: int, scale: float = 1.0, stream: object) -> None:
    """Numbers uniform in [-scale, scale), or random bits with dtype `words`; the same for the same seed and place."""
    if dtype not in FILL_KINDS:
        raise ValueError(f"dtype={dtype!r}; allowed: {', '.join(FILL_KINDS)}")
    options = {"kind": FILL_KINDS[dtype], "seed": seed & 0xFFFFFFFF, "scale": scale}
    extension().probe_fill(*what, **options, stream=stream_handle(stream))


def delay(ns: int, *, stream: object) -> None:
    """Holds the stream for about `ns` nanoseconds, at most half a second, while the caller enqueues what follows."""
    extension().probe_delay(ns, stream=stream_handle(stream))
