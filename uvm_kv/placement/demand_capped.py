"""demand_capped: demand paging on a card that is made to look smaller.

There is no prefetch. Before each layer the first-in chunks beyond the device tier are evicted by plan, so that a large
card behaves like a small one. The bytes are counted as planned evictions, never as the driver's.
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
        if spec.layout is not Layout.LAYER_MAJOR:
            raise ValueError(
                f"placement=demand_capped needs layout=layer_major, given is {spec.layout}: over block_major "
                f"every layer touches every block, and no cap below the whole set can be kept"
            )
        # A unit is one chunk of one layer, or the chunks of one block and layer where that is larger than a chunk.
        self._group = spec.pieces_per_chunk
        self._cap = spec.num_chunks(context.capacity.num_device_blocks) // spec.chunks_per_piece
        self._first_in: dict[tuple[int, int], None] = {}

    @property
    def reach(self) -> Reach | None:
        return None

    def place(self, view: PlacementView, num_blocks: int, *, admitting: bool) -> Share | None:
        return device_then_host(view, num_blocks)

    def plan(self, view: PlacementView) -> tuple[MemoryOp, ...]:
        assert view.tables is not None
        groups = dict.fromkeys(b // self._group for table in view.tables for b in table)
        num_blocks = sum(self.context.capacity)
        first_in, ops = self._first_in, []
        for layer in range(self.context.spec.num_layers):
            incoming = [key for group in groups if (key := (layer, group)) not in first_in]
            excess = len(first_in) + len(incoming) - self._cap
            victims: dict[int, list[int]] = {}
            while excess > 0 and first_in:
                data_layer, group = key = next(iter(first_in))
                del first_in[key]
                stop = min((group + 1) * self._group, num_blocks)
                victims.setdefault(data_layer, []).extend(range(group * self._group, stop))
                if data_layer == layer and group in groups:
                    incoming.append(key)  # It faults back within the same layer.
                else:
                    excess -= 1
            first_in.update(dict.fromkeys(incoming))
            for data_layer, blocks in victims.items():
                ops.append(MemoryOp(OpKind.EVICT, tuple(blocks), data_layer, data_layer + 1, data_layer - layer))
        return tuple(ops)
