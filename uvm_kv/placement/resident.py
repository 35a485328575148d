"""resident: blocks live on the device, nothing moves within a step; a host tier serves swap only."""

from __future__ import annotations

from uvm_kv.kvcache.ops import MemoryOp
from uvm_kv.placement.base import PlacementPolicy, PlacementView, Share
from uvm_kv.types import MemoryKind, Reach


class Resident(PlacementPolicy):
    memory_kinds = frozenset({MemoryKind.DEVICE, MemoryKind.PINNED})
    uses_host = False

    @property
    def reach(self) -> Reach | None:
        return None

    def place(self, view: PlacementView, num_blocks: int, *, admitting: bool) -> Share | None:
        return Share(num_blocks, 0) if num_blocks <= view.available_device else None

    def plan(self, view: PlacementView) -> tuple[MemoryOp, ...]:
        return ()
