"""Ids, enums and units that every room shares. Imports nothing of the project.

Sizes are in bytes, times in integer nanoseconds at every public boundary (`_ns`) or in float seconds inside a
formula (`_s`), rates in bytes per second.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
NS_PER_S = 1_000_000_000

CHUNK_BYTES = 2 * MIB
"""Unit of residency of managed memory: one VA block, one root chunk (NVIDIA open-gpu-kernel-modules 595.45.04)."""


class Tier(Enum):
    DEVICE = "device"
    HOST = "host"


class Phase(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class MemoryKind(StrEnum):
    """How the KV slabs are allocated (design, section 3)."""

    DEVICE = "device"
    PINNED = "pinned"
    MANAGED = "managed"
    VMM = "vmm"


class Layout(StrEnum):
    LAYER_MAJOR = "layer_major"
    BLOCK_MAJOR = "block_major"


class Reach(StrEnum):
    """When in a step a placement may use the link for host KV, hence which ceiling bounds its gain."""

    IN_PLACE = "in_place"
    COPY_AHEAD = "copy_ahead"
    BOTH = "both"


class Allocation(StrEnum):
    """How sequences get their KV memory.

    paged: any block, as tokens come. on_demand: one run of blocks that grows as tokens come, and moves where it cannot.
    reserve_max: one run for the longest request, first fit (FasterTransformer). orca_*: one chunk of a buddy allocator,
    for the longest request (max), for prompt plus output (oracle), or for prompt plus output with the output rounded up
    to a power of two, 25 to 32 (pow2): the three Orcas of Kwon et al., "Efficient Memory Management for Large Language
    Model Serving with PagedAttention", SOSP 2023, section 6.1.
    """

    PAGED = "paged"
    ON_DEMAND = "on_demand"
    RESERVE_MAX = "reserve_max"
    ORCA_MAX = "orca_max"
    ORCA_POW2 = "orca_pow2"
    ORCA_ORACLE = "orca_oracle"

    @property
    def is_buddy(self) -> bool:
        return self in (Allocation.ORCA_MAX, Allocation.ORCA_POW2, Allocation.ORCA_ORACLE)

    @property
    def grows(self) -> bool:
        """Whether memory is taken as tokens come, and not at once for the whole request."""
        return self in (Allocation.PAGED, Allocation.ON_DEMAND)

    def claim_tokens(self, prompt_tokens: int, output_tokens: int, max_model_len: int) -> int:
        """Tokens that worst-case admission claims for a request; a scheme that does not grow takes them at once."""
        if self in (Allocation.RESERVE_MAX, Allocation.ORCA_MAX):
            return max_model_len
        if self is Allocation.ORCA_POW2:
            return min(max_model_len, prompt_tokens + (1 << (output_tokens - 1).bit_length()))
        return prompt_tokens + output_tokens


@dataclass(frozen=True)
class Hints:
    """cudaMemAdvise on the managed KV slab (design, section 3)."""

    preferred_location: str = "none"
    """none, device, host, or by_tier: each block prefers the tier its id lies in."""
    accessed_by: bool = False
    read_mostly: bool = False
    discard_on_free: bool = False

    def location(self, *, host_tier: bool) -> str | None:
        """device, host, or None for no preference, of the blocks of a tier."""
        location = self.preferred_location
        if location not in ("none", "device", "host", "by_tier"):
            raise ValueError(f"hints.preferred_location={location}; allowed are none, device, host, by_tier")
        if location == "by_tier":
            location = "host" if host_tier else "device"
        return None if location == "none" else location


OUR_ENGINE = "uvm_kv"
"""`engine` of runs of ours, and what those of an older version are of, whose summaries say no engine; any other is a
peer."""

BASELINES = ("device_resident", "device_recompute")
"""The mechanisms without CPU-backed KV: the better of them is what a verdict compares with (design, section 3)."""

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
