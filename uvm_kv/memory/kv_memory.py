"""KVMemory: the slabs of both tiers for one memory kind, and which slab holds which block.

Device blocks are [0, D), host blocks [D, D + H):

    device    one slab, no host tier             pinned   a device slab and a pinned slab
    managed   one slab, one layout over D + H    vmm      one slab: D blocks on the device, then H on the host
"""

from __future__ import annotations

from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.memory.copies import Placed
from uvm_kv.memory.layout import slab_bytes, slab_layout
from uvm_kv.memory.residency import MemAdvice, advise, device_place, host_place
from uvm_kv.memory.slab import Slab
from uvm_kv.types import Hints, MemoryKind, ceil_div


class KVMemory:
    def __init__(
        self,
        kind: MemoryKind,
        spec: KVCacheSpec,
        num_device_blocks: int,
        num_host_blocks: int,
        *,
        device: int = 0,
        allow_oversubscription: bool = False,
    ) -> None:
        if kind is MemoryKind.DEVICE and num_host_blocks:
            raise ValueError(f"memory=device has no host tier, and num_host_blocks={num_host_blocks}")
        if num_device_blocks < 1:
            raise ValueError(f"num_device_blocks={num_device_blocks}; at least one block must lie on the device")
        self.kind, self.num_device_blocks, self.num_host_blocks = kind, num_device_blocks, num_host_blocks
        near, far = slab_bytes(spec, num_device_blocks), slab_bytes(spec, num_host_blocks)
        self.host: Placed | None = None
        if kind is MemoryKind.MANAGED:
            both = num_device_blocks + num_host_blocks
            allow = allow_oversubscription
            slab = Slab.managed(slab_bytes(spec, both), device=device, allow_oversubscription=allow)
            self.device = Placed(slab, slab_layout(spec, num_blocks=both))
        elif kind is MemoryKind.VMM:
            slab = Slab.vmm(near + far, device_bytes=near, device=device)
            self.device = Placed(slab, slab_layout(spec, num_blocks=num_device_blocks))
            if num_host_blocks:
                self.host = Placed(slab, slab_layout(spec, num_blocks=num_host_blocks, base_bytes=near))
        else:
            self.device = Placed(Slab.device(near, device=device), slab_layout(spec, num_blocks=num_device_blocks))
            if num_host_blocks:
                try:
                    slab = Slab.pinned(far, device=device)
                except BaseException:
                    self.device.slab.close()
                    raise
                self.host = Placed(slab, slab_layout(spec, num_blocks=num_host_blocks))

    def locate(self, block: int) -> tuple[Placed, int]:
        """The slab of a block, and the block's index in that slab."""
        if not 0 <= block < self.num_device_blocks + self.num_host_blocks:
            raise ValueError(f"block {block} of {self.num_device_blocks} + {self.num_host_blocks}")
        if self.host is None or block < self.num_device_blocks:
            return self.device, block
        return self.host, block - self.num_device_blocks

    def address(self, block: int, layer: int) -> int:
        """Where the K and V of a block lie in one layer."""
        placed, index = self.locate(block)
        return placed.slab.address + int(placed.layout.offset(index, layer))

    def advise(self, hints: Hints, *, stream: object) -> None:
        """Gives the hints to managed blocks. Chunks are one tier's: one that blocks of both share is the device's."""
        slab, layout = self.device
        num_blocks, group = int(layout.num_blocks), int(layout.pieces_per_group)
        boundary = min(num_blocks, ceil_div(self.num_device_blocks, group) * group)
        device = device_place(slab.device_ordinal)
        for tier, host_tier in ((range(boundary), False), (range(boundary, num_blocks), True)):
            if not tier:
                continue
            parts = layout.ranges(list(tier), layers=(0, layout.num_layers))
            location = hints.location(host_tier=host_tier)
            if location is not None:
                place = device if location == "device" else host_place()
                advise(slab, parts, MemAdvice.SET_PREFERRED_LOCATION, place, stream=stream)
            if hints.accessed_by:
                advise(slab, parts, MemAdvice.SET_ACCESSED_BY, device, stream=stream)
            if hints.read_mostly:
                advise(slab, parts, MemAdvice.SET_READ_MOSTLY, device, stream=stream)

    def close(self) -> None:
        self.device.slab.close()
        if self.host is not None:
            self.host.slab.close()
