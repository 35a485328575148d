"""CpuKV: KV memory and attention on the CPU, with torch's own operators over blocks that are gathered first."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.kvcache.ops import MemoryCounters, OpKind
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.runner.torch.kv import Issued, KVBackend, SequenceRows, random_kv
from uvm_kv.runner.torch.kv_store import BlockIndex, KVStore, SlotIndex
from uvm_kv.runner.torch.ranges import mark
from uvm_kv.types import MemoryKind, ceil_div

# The CPU has no device memory: what a GPU's driver or link would count is not observed.
NOT_OBSERVED = MemoryCounters(*(None for _ in MemoryCounters._fields))


@dataclass(frozen=True)
class Decodes:
    """Sequences with one new token each: their rows, their blocks padded to the longest, and what is masked out."""

    rows: Tensor
    blocks: BlockIndex
    mask: Tensor
    """[sequence, 1, 1, slot]: True where a slot holds a token of the sequence."""


@dataclass(frozen=True)
class Prefill:
    """One chunk: rows [start, stop) behind `context_len` cached tokens."""

    start: int
    stop: int
    context_len: int
    blocks: BlockIndex


class CpuKV(KVBackend):
    def __init__(self, spec: KVCacheSpec, capacity: KVCapacity, memory: MemoryKind, dtype: torch.dtype) -> None:
        self.device = torch.device("cpu")
        self._spec = spec
        self._dtype = dtype
        self._store = KVStore(spec, capacity, dtype, managed=memory is MemoryKind.MANAGED)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self._store.move(sources, targets)

    def poison(self, blocks: Sequence[int]) -> None:
        self._store.poison(blocks)

    def acquire(self, blocks: Sequence[int]) -> None:
        self._store.acquire(blocks)

    def fill(self, blocks: Sequence[int], num_tokens: int, generator: torch.Generator) -> None:
        size = self._spec.block_size
        tokens = range(num_tokens)
        slots = SlotIndex([blocks[t // size] for t in tokens], [t % size for t in tokens], self._store.num_device)
        for layer in range(self._spec.num_layers):
            self._store.write(layer, slots, *random_kv(self._spec, num_tokens, generator, self._dtype))

    def begin_step(self, batch: Sequence[SequenceRows], issued: Issued) -> None:
        size, num_device = self._spec.block_size, self._store.num_device
        blocks: list[int] = []
        offsets: list[int] = []
        for sequence in batch:
            positions = range(sequence.context_len, sequence.total)
            blocks += [sequence.blocks[p // size] for p in positions]
            offsets += [p % size for p in positions]
        self._slots = SlotIndex(blocks, offsets, num_device)
        decodes = [sequence for sequence in batch if sequence.is_decode]
        self._decodes = self._decode_batch(decodes) if decodes else None
        self._prefills = []
        for sequence in batch:
            if not sequence.is_decode:
                held = sequence.blocks[: ceil_div(sequence.total, size)] if sequence.context_len else [0]
                index = BlockIndex(torch.tensor(held), num_device)
                self._prefills.append(Prefill(sequence.first, sequence.stop, sequence.context_len, index))
        self._issued = issued

    def _decode_batch(self, decodes: Sequence[SequenceRows]) -> Decodes:
        size = self._spec.block_size
        width = ceil_div(max(sequence.total for sequence in decodes), size)
        padded = []
        for sequence in decodes:
            held = sequence.blocks[: ceil_div(sequence.total, size)]
            # The padding repeats a block of the sequence's own: finite, and masked out.
            padded += held + held[-1:] * (width - len(held))
        totals = torch.tensor([sequence.total for sequence in decodes])
        mask = torch.arange(width * size)[None, :] < totals[:, None]
        return Decodes(
            torch.tensor([sequence.first for sequence in decodes]),
            BlockIndex(torch.tensor(padded), self._store.num_device),
            mask[:, None, None, :],
        )

    def integers(self, *lists: Sequence[int], into: Tensor | None = None) -> list[Tensor]:
        assert into is None, "the CPU has no graphs"
        return [torch.tensor(values, dtype=torch.long) for values in lists]

    def scope(self) -> AbstractContextManager[object]:
        return nullcontext()

    def end_step(self) -> MemoryCounters:
        return NOT_OBSERVED

    def close(self) -> None:
        pass

    def _before_layer(self, layer: int) -> None:
        for op, data_layer in self._issued.get(layer, ()):
            with mark("evict" if op.kind is OpKind.EVICT else "prefetch"):
                if op.kind is OpKind.COPY_IN:
                    self._store.stage(data_layer % self._spec.num_layers, op.blocks)
                elif op.kind is OpKind.EVICT:
                    self._store.evict(data_layer, data_layer + 1, op.blocks)
                elif op.kind is OpKind.PREFETCH:
                    self._store.touch(data_layer % self._spec.num_layers, torch.tensor(op.blocks))
                else:
                    raise ValueError(f"op {op.kind} is not served by runner=cpu")

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        self._before_layer(layer)
        with mark("append"):
            self._store.write(layer, self._slots, key, value)
        with mark("attention"):
            out = self._attend(layer, query, key, value, scaling)
        self._store.drop_staged(layer)
        return out

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        if self._decodes is not None and not self._prefills:
            out = self._decode(layer, self._decodes, query, scaling)
        else:
            out = torch.empty_like(query)
            if self._decodes is not None:
                out[self._decodes.rows] = self._decode(layer, self._decodes, query[self._decodes.rows], scaling)
            for chunk in self._prefills:
                rows = slice(chunk.start, chunk.stop)
                out[rows] = self._prefill(layer, chunk, query[rows], key[rows], value[rows], scaling)
        return out

    def _decode(self, layer: int, batch: Decodes, query: Tensor, scaling: float | None) -> Tensor:
        num_seqs = len(batch.rows)
        cached = self._store.read(layer, batch.blocks)  # [sequence * block, slot, K|V, kv_head, dim]
        kv_heads, dim = cached.shape[-2:]
        cached = cached.view(num_seqs, -1, 2, kv_heads, dim)
        # The query heads that share a KV head stand in for query positions: no KV is repeated.
        grouped = query.reshape(num_seqs, kv_heads, -1, dim)
        out = F.scaled_dot_product_attention(
            grouped,
            cached[:, :, 0].transpose(1, 2),
            cached[:, :, 1].transpose(1, 2),
            attn_mask=batch.mask,
            scale=scaling,
        )
        return out.reshape(num_seqs, -1, dim)

    def _prefill(
        self, layer: int, chunk: Prefill, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
    ) -> Tensor:
        num_new, mask = chunk.stop - chunk.start, None
        if chunk.context_len:
            total = chunk.context_len + num_new
            cached = self._store.read(layer, chunk.blocks).flatten(0, 1)[:total]  # [token, K|V, kv_head, dim]
            key, value = cached[:, 0], cached[:, 1]
            position = torch.arange(chunk.context_len, total)[:, None]
            mask = position >= torch.arange(total)[None, :]
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1).transpose(0, 1)[None] for x in (key, value))
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None], key, value, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        return out[0].transpose(0, 1)
