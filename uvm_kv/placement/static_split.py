"""static_split: overflow blocks live on the host and are read in place by attention."""

from __future__ import annotations

from uvm_kv.kvcache.ops import MemoryOp
from uvm_kv.placement.base import PlacementPolicy, PlacementView, Share, device_then_host
from uvm_kv.types import MemoryKind, Reach


class StaticSplit(PlacementPolicy):
    memory_kinds = frozenset({MemoryKind.PINNED, MemoryKind.MANAGED, MemoryKind.VMM})
    uses_host = True

    @property
    def reach(self) -> Reach | None:
        return Reach.IN_PLACE

    def place(self, view: PlacementView, num_blocks: int, *, admitting: bool) -> Share | None:
        return device_then_host(view, num_blocks)

    def plan(self, view: PlacementView) -> tuple[MemoryOp, ...]:
        return ()
