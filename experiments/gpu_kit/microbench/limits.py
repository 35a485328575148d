"""How much memory the microbenchmark may take, and the ledger that refuses the rest. No oversubscription, no ballast.

Managed memory: 24 GB in all and half of what is free on the card. cudaMalloc: 20 GB. Pinned (and the host part of a
vmm slab): 16 GiB and a third of the host memory that is available. Device and managed memory together stay below nine
tenths of what is free.
"""

from __future__ import annotations

from typing import NamedTuple

from uvm_kv.types import CHUNK_BYTES, GIB

GB = 10**9
MAX_MANAGED_BYTES = 24 * GB
MAX_DEVICE_BYTES = 20 * GB
MAX_PINNED_BYTES = 16 * GIB
KINDS = ("device", "pinned", "managed")


class LimitError(Exception):
    """More memory than the microbenchmark allows itself here: the case is not run."""


class Limits(NamedTuple):
    """Bytes."""

    device: int
    pinned: int
    managed: int
    card: int
    """Device and managed memory together."""


def limits_for(free_bytes: int, available_bytes: int) -> Limits:
    """`free_bytes` of the card, `available_bytes` of the host, both now. Managed memory may end up on the host too."""
    third = available_bytes // 3
    return Limits(
        device=min(MAX_DEVICE_BYTES, free_bytes * 8 // 10),
        pinned=min(MAX_PINNED_BYTES, third),
        managed=min(MAX_MANAGED_BYTES, free_bytes // 2, third),
        card=free_bytes * 9 // 10,
    )


class Ledger:
    """Bytes taken now, by kind."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.held = dict.fromkeys(KINDS, 0)
        self.peak = dict.fromkeys(KINDS, 0)

    def room(self, kind: str) -> int:
        """Bytes that `take` would still allow."""
        own: int = getattr(self.limits, kind) - self.held[kind]
        if kind == "pinned":
            return max(0, own)
        on_card = self.limits.card - self.held["device"] - self.held["managed"]
        return max(0, min(own, on_card))

    def take(self, kind: str, num_bytes: int) -> None:
        if num_bytes > self.room(kind):
            raise LimitError(
                f"{num_bytes} bytes of {kind} memory, and {self.room(kind)} are left of the "
                f"{getattr(self.limits, kind)} that the microbenchmark allows itself here"
            )
        self.held[kind] += num_bytes
        self.peak[kind] = max(self.peak[kind], self.held[kind])

    def give_back(self, kind: str, num_bytes: int) -> None:
        self.held[kind] -= num_bytes


def whole_chunks(num_bytes: int) -> int:
    """Rounded up to a slab's unit of 2 MiB."""
    return -(-num_bytes // CHUNK_BYTES) * CHUNK_BYTES


def scaled(wanted: int, room: int, unit: int, least: int = 1) -> int:
    """`wanted` units, or as many as fit into `room` bytes, a power of two of them; LimitError below `least` units."""
    num = wanted
    while num >= least and num * unit > room:
        num //= 2
    if num < least:
        raise LimitError(f"{least * unit} bytes are the least this takes, and there is room for {room}")
    return num
