"""prefetch_ahead: the next k layers' host blocks are brought in before they are needed, and dropped after.

It does not choose: every request is admitted whose host blocks can be staged, whether or not the link keeps up. So
where staging is what limits the batch, more device memory admits more requests, the link carries more on every step,
and throughput may fall: SmolLM2-135M with ShareGPT's lengths and 64 clients on a simulated RTX 2080 Ti serves 94, 91
and 82 tok/s from managed memory with 128, 192 and 256 MiB of device KV, since 14, 24 and 25 requests run in the mean.
`bandwidth_balanced` is the placement that predicts this.
"""

from __future__ import annotations

from uvm_kv.kvcache.ops import MemoryOp
from uvm_kv.placement.base import CopyAhead, CopyAheadOptions, PlacementContext, PlacementPolicy, PlacementView, Share
from uvm_kv.types import MemoryKind, Reach


class PrefetchAhead(PlacementPolicy):
    memory_kinds = frozenset({MemoryKind.PINNED, MemoryKind.VMM, MemoryKind.MANAGED})
    uses_host = True
    options_type = CopyAheadOptions

    def __init__(self, context: PlacementContext) -> None:
        super().__init__(context)
        self._copies = CopyAhead(context, self.options_in(context.options).num_layers_ahead)

    @property
    def reach(self) -> Reach | None:
        return Reach.COPY_AHEAD

    def place(self, view: PlacementView, num_blocks: int, *, admitting: bool) -> Share | None:
        return self._copies.place(view, num_blocks, admitting=admitting)

    def plan(self, view: PlacementView) -> tuple[MemoryOp, ...]:
        return self._copies.ops(view.host_blocks)
