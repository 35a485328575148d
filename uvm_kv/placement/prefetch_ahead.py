"""prefetch_ahead: the next k layers' host blocks are brought in before they are needed, and dropped after."""

from __future__ import annotations

from uvm_kv.kvcache.ops import MemoryOp
from uvm_kv.placement.base import CopyAhead, PlacementContext, PlacementPolicy, PlacementView, Share
from uvm_kv.types import MemoryKind, Reach


class PrefetchAhead(PlacementPolicy):
    memory_kinds = frozenset({MemoryKind.PINNED, MemoryKind.VMM, MemoryKind.MANAGED})
    uses_host = True

    def __init__(self, context: PlacementContext) -> None:
        super().__init__(context)
        self._copies = CopyAhead(context)

    @property
    def reach(self) -> Reach | None:
        return Reach.COPY_AHEAD

    def place(self, view: PlacementView, num_blocks: int, *, admitting: bool) -> Share | None:
        return self._copies.place(view, num_blocks, admitting=admitting)

    def plan(self, view: PlacementView) -> tuple[MemoryOp, ...]:
        return self._copies.ops(view.host_blocks)
