"""demand: no ops. One managed range as large as both tiers; the driver pages what is touched.

Device and host ids only say how much address space there is: the driver decides where a chunk lies.
"""

from __future__ import annotations

from uvm_kv.kvcache.ops import MemoryOp
from uvm_kv.placement.base import PlacementPolicy, PlacementView, Share, device_then_host
from uvm_kv.types import MemoryKind, Reach


class Demand(PlacementPolicy):
    memory_kinds = frozenset({MemoryKind.MANAGED})
    uses_host = True

    @property
    def reach(self) -> Reach | None:
        return None

    def place(self, view: PlacementView, num_blocks: int, *, admitting: bool) -> Share | None:
        return device_then_host(view, num_blocks)

    def plan(self, view: PlacementView) -> tuple[MemoryOp, ...]:
        return ()
