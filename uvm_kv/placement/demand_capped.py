"""demand_capped: demand paging on a card that is made to look smaller.

No prefetch. Before each layer the first-in chunks beyond the device tier are evicted by plan, so that a small card can
be played on a large one. The bytes are counted as planned evictions, never as the driver's.
"""

from __future__ import annotations

from uvm_kv.kvcache.ops import MemoryOp, OpKind
from uvm_kv.placement.base import PlacementContext, PlacementPolicy, PlacementView, Share, device_then_host
from uvm_kv.types import Layout, MemoryKind, Reach


class DemandCapped(PlacementPolicy):
    memory_kinds = frozenset({MemoryKind.MANAGED})
    uses_host = True
    needs_tables = True

    def __init__(self, context: PlacementContext) -> None:
        super().__init__(context)
        spec = context.spec
        per_layer = spec.layout is Layout.LAYER_MAJOR
        self._layers = spec.num_layers if per_layer else 1
        self._group = spec.pieces_per_chunk
        self._num_blocks = sum(context.capacity)
        # A unit is one chunk, or the chunks of one block where a block is larger than a chunk.
        num_groups = context.capacity.num_device_blocks // self._group
        self._cap = num_groups * self._layers
        self._first_in: dict[tuple[int, int], None] = {}

    @property
    def reach(self) -> Reach | None:
        return None

    def place(self, view: PlacementView, num_blocks: int, *, admitting: bool) -> Share | None:
        return device_then_host(view, num_blocks)

    def plan(self, view: PlacementView) -> tuple[MemoryOp, ...]:
        assert view.tables is not None
        groups = dict.fromkeys(b // self._group for table in view.tables for b in table)
        first_in, ops = self._first_in, []
        for layer in range(self._layers):
            incoming = [key for group in groups if (key := (layer, group)) not in first_in]
            excess = len(first_in) + len(incoming) - self._cap
            victims: dict[int, list[int]] = {}
            for _ in range(min(excess, len(first_in))):
                data_layer, group = next(iter(first_in))
                del first_in[data_layer, group]
                stop = min((group + 1) * self._group, self._num_blocks)
                victims.setdefault(data_layer, []).extend(range(group * self._group, stop))
            first_in.update(dict.fromkeys(incoming))
            for data_layer, blocks in victims.items():
                last = data_layer + 1 if self._layers > 1 else self.context.spec.num_layers
                ops.append(MemoryOp(OpKind.EVICT, tuple(blocks), data_layer, last, data_layer - layer))
        return tuple(ops)
