"""MemoryOp: what a plan moves. MemoryCounters: what a runner saw move. Intent and observation are two types."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple


class OpKind(StrEnum):
    PREFETCH = "prefetch"
    """Managed memory: migrate the chunks of the blocks to the device."""
    EVICT = "evict"
    """Managed memory: migrate the chunks of the blocks to the host, by plan; never the driver's own eviction."""
    COPY_IN = "copy_in"
    """Host block to device block (`targets`), or to the runner's staging of that layer where targets are empty."""
    COPY_OUT = "copy_out"
    """Device block to host block (`targets`)."""
    ADVISE = "advise"
    """Managed memory: apply the configured hints to the blocks."""
    DISCARD = "discard"
    """Managed memory: the content of the blocks is dead."""


class MemoryOp(NamedTuple):
    """Move `blocks` for each layer of the half-open range [first_layer, last_layer).

    The part of layer l is issued before layer max(0, l - lead), and layer l needs it. `lead` is negative for an
    eviction that is issued after its layer: with -1 it is issued before layer l + 1. A layer l >= num_layers is layer
    l - num_layers of the next step, so a copy ahead can cross the step boundary. A staged copy (COPY_IN with no
    targets) lives until its layer has run; slots that the step itself writes are written to both copies.
    """

    kind: OpKind
    blocks: tuple[int, ...]
    first_layer: int
    last_layer: int
    lead: int = 0
    targets: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return self._asdict() | {"kind": self.kind.value}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> MemoryOp:
        fields = dict(raw, kind=OpKind(raw["kind"]), blocks=tuple(raw["blocks"]), targets=tuple(raw["targets"]))
        return cls(**fields)


class MemoryCounters(NamedTuple):
    """One step as observed. None where the runner cannot observe it, never 0 for that."""

    h2d_copy_bytes: int | None = 0
    h2d_fault_bytes: int | None = 0
    h2d_prefetch_bytes: int | None = 0
    h2d_remote_read_bytes: int | None = 0
    d2h_copy_bytes: int | None = 0
    d2h_eviction_bytes: int | None = 0
    d2h_planned_eviction_bytes: int | None = 0
    d2h_remote_write_bytes: int | None = 0
    gpu_fault_groups: int | None = 0
    evicted_chunks: int | None = 0
    """2 MiB chunks that the driver evicted."""
    stall_ns: int | None = 0
    """Time the compute stream waited for memory."""


NO_TRAFFIC = MemoryCounters()
