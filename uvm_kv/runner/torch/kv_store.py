"""KVStore: the two tiers of KV memory as two separate buffers, on the CPU.

    layer_major  [layer, block, slot, K|V, head, dim]      block_major  [block, layer, slot, K|V, head, dim]

Copies are real: host blocks, device blocks and staged copies are three different memories. Memory without live KV holds
NaN, so a plan that reads a block from the wrong place, or too late, shows in the logits.

Managed memory is one range of ids over both tiers; here each block of each layer lies in one of two buffers, and
touching one that was evicted by plan brings it back, as a page fault would.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.types import Layout


class KVStore:
    def __init__(self, spec: KVCacheSpec, capacity: KVCapacity, dtype: torch.dtype, *, managed: bool) -> None:
        self.spec = spec
        self.num_device = sum(capacity) if managed else capacity.num_device_blocks
        num_host = self.num_device if managed else capacity.num_host_blocks
        # At least one block: rows that a host block will fill are first gathered from device block 0.
        self._device = self._slab(max(1, self.num_device), dtype)
        self._host = self._slab(num_host, dtype)
        self._evicted = torch.zeros(spec.num_layers, self.num_device, dtype=torch.bool) if managed else None
        self._any_evicted = False
        self._staged: dict[int, tuple[dict[int, int], Tensor]] = {}
        """Layer -> (block -> row, rows): host blocks copied ahead for that layer."""

    def _slab(self, num_blocks: int, dtype: torch.dtype) -> Tensor:
        """Indexed [layer, block, slot, K|V, head, dim] whatever the layout."""
        spec = self.spec
        piece = (spec.block_size, 2, spec.num_kv_heads, spec.head_dim)
        if spec.layout is Layout.LAYER_MAJOR:
            return torch.full((spec.num_layers, num_blocks, *piece), torch.nan, dtype=dtype)
        return torch.full((num_blocks, spec.num_layers, *piece), torch.nan, dtype=dtype).transpose(0, 1)

    def _locate(self, block: int) -> tuple[Tensor, int]:
        """The slab and the index in it of a block."""
        if block < self.num_device:
            return self._device, block
        return self._host, block - self.num_device

    # ---- whole blocks, all layers

    def poison(self, blocks: Sequence[int]) -> None:
        """Fill freed blocks with NaN."""
        for block in blocks:
            slab, index = self._locate(block)
            slab[:, index] = torch.nan
        self._bring_back_empty(blocks)

    def _bring_back_empty(self, blocks: Sequence[int]) -> None:
        """Managed memory: the free blocks in a chunk are evicted with it, though nothing reads what they hold."""
        if self._evicted is not None and blocks:
            self._host[:, list(blocks)] = torch.nan
            self._evicted[:, list(blocks)] = False

    def acquire(self, blocks: Sequence[int]) -> None:
        """New blocks of a table: the slots that no token has reached yet are masked out, and must be finite for it."""
        for block in blocks:
            slab, index = self._locate(block)
            slab[:, index] = 0
        self._bring_back_empty(blocks)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks to other blocks, of either tier."""
        content = []
        for block in sources:
            slab, index = self._locate(block)
            content.append(slab[:, index].clone())
        for block, value in zip(targets, content, strict=True):
            slab, index = self._locate(block)
            slab[:, index] = value

    # ---- one layer

    def stage(self, layer: int, blocks: Sequence[int]) -> None:
        """Copy host blocks of a layer ahead of it."""
        rows, buffer = self._staged.get(layer, ({}, None))
        index = [b - self.num_device for b in blocks]
        copied = self._host[layer, index]
        first = 0 if buffer is None else len(buffer)
        rows = rows | {block: first + i for i, block in enumerate(blocks)}
        self._staged[layer] = (rows, copied if buffer is None else torch.cat((buffer, copied)))

    def drop_staged(self, layer: int) -> None:
        self._staged.pop(layer, None)

    def evict(self, first_layer: int, last_layer: int, blocks: Sequence[int]) -> None:
        """Managed memory: move blocks of some layers to the host buffer."""
        assert self._evicted is not None, "only managed memory is evicted"
        index = torch.tensor(blocks)
        for layer in range(first_layer, last_layer):
            present = index[~self._evicted[layer, index]]
            self._host[layer, present] = self._device[layer, present]
            self._device[layer, present] = torch.nan
            self._evicted[layer, present] = True
        self._any_evicted = True

    def touch(self, layer: int, blocks: Tensor) -> None:
        """Managed memory: bring back what was evicted."""
        if not self._any_evicted:
            return
        assert self._evicted is not None
        absent = blocks[self._evicted[layer, blocks]]
        if len(absent):
            self._device[layer, absent] = self._host[layer, absent]
            self._host[layer, absent] = torch.nan
            self._evicted[layer, absent] = False

    def write(self, layer: int, slots: SlotIndex, key: Tensor, value: Tensor) -> None:
        """Store K and V [token, head, dim] of new tokens; into the staged copy too, where there is one."""
        self.touch(layer, slots.device_blocks)
        new = torch.stack((key, value), 1)
        if not len(slots.host_tokens):
            self._device[layer][slots.device_blocks, slots.device_offsets] = new
        else:
            self._device[layer][slots.device_blocks, slots.device_offsets] = new[slots.device_tokens]
            new = new[slots.host_tokens]
            self._host[layer][slots.host_blocks, slots.host_offsets] = new
            staged = self._staged.get(layer)
            if staged is not None:
                rows, buffer = staged
                ids = (slots.host_blocks + self.num_device).tolist()
                hits = [i for i, block in enumerate(ids) if block in rows]
                if hits:
                    at = torch.tensor([rows[ids[i]] for i in hits])
                    buffer[at, slots.host_offsets[hits]] = new[hits]

    def read(self, layer: int, blocks: BlockIndex) -> Tensor:
        """Gather blocks: [len(blocks), slot, K|V, head, dim]. Staged copies are read where there are any, else host
        blocks in place."""
        self.touch(layer, blocks.device)
        rows = self._device[layer].index_select(0, blocks.device)
        if len(blocks.host_rows):
            rows[blocks.host_rows] = self._host[layer].index_select(0, blocks.host)
            staged = self._staged.get(layer)
            if staged is not None:
                names, buffer = staged
                for row, block in zip(blocks.host_rows.tolist(), blocks.host.tolist(), strict=True):
                    at = names.get(block + self.num_device)
                    if at is not None:
                        rows[row] = buffer[at]
        return rows


class SlotIndex:
    """Where the new tokens of a step go: per tier the tokens, their blocks and their offsets in them."""

    def __init__(self, blocks: list[int], offsets: list[int], num_device: int) -> None:
        block, offset = torch.tensor(blocks), torch.tensor(offsets)
        on_device = block < num_device
        self.device_tokens = on_device.nonzero().flatten()
        self.host_tokens = (~on_device).nonzero().flatten()
        self.device_blocks, self.device_offsets = block[on_device], offset[on_device]
        self.host_blocks, self.host_offsets = block[~on_device] - num_device, offset[~on_device]


class BlockIndex:
    """Blocks to gather, in order; host ones as rows to be filled from the other slab."""

    def __init__(self, blocks: Tensor, num_device: int) -> None:
        on_device = blocks < num_device
        self.host_rows = (~on_device).nonzero().flatten()
        self.host = blocks[~on_device] - num_device
        self.device = torch.where(on_device, blocks, 0)
