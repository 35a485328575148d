"""A random batch over a poisoned cache, and attention in float64 to hold the kernels against.

Every slot that no token uses is NaN, and so is the output before a run. K and V go in by the append kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.memory import KVMemory, PagedAttention, PagedKV, Slab, append_kv
from uvm_kv.types import DTYPE_BYTES, MIB, Layout, MemoryKind

Array = npt.NDArray[Any]

POISON = 0xFF
"""All bits set: NaN in every dtype."""
TOLERANCE = {"float16": 6e-4, "bfloat16": 5e-3, "float32": 2e-6}
"""Norm of the error over the norm of the result: half a unit in the last place of the stored output, and a little."""


def to_stored(values: Array, dtype: str) -> Array:
    """float16 and float32 as such, bfloat16 as its bits."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_stored(stored: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


class Shared(NamedTuple):
    """One piece of pinned memory, as the host and as kernels see it."""

    host: Array
    device: Any


class Arena:
    """Arrays that both sides reach, one after the other in a pinned slab."""

    def __init__(self, num_bytes: int = 64 * MIB) -> None:
        self.slab, self.used = Slab.pinned(num_bytes), 0

    def array(self, values: Array, dtype: str | None = None) -> Shared:
        """A copy of `values`; `dtype` where they are bits."""
        values = np.ascontiguousarray(values)
        raw = self.slab.host_view(offset=self.used, num_bytes=max(16, values.nbytes))[: values.nbytes]
        host = raw.view(values.dtype).reshape(values.shape)
        host[...] = values
        device = self.slab.view(values.shape, dtype or str(values.dtype), offset=self.used)
        self.used += -(-max(16, values.nbytes) // 256) * 256
        return Shared(host, device)

    def close(self) -> None:
        self.slab.close()


@dataclass(frozen=True)
class Shape:
    dtype: str = "float16"
    head_dim: int = 128
    num_q_heads: int = 8
    num_kv_heads: int = 2
    block_size: int = 16
    layout: Layout = Layout.LAYER_MAJOR
    num_layers: int = 2
    split_tokens: int = 128

    @property
    def spec(self) -> KVCacheSpec:
        element = DTYPE_BYTES[self.dtype]
        return KVCacheSpec(self.num_layers, self.num_kv_heads, self.head_dim, element, self.block_size, self.layout)


class Rows(NamedTuple):
    """New tokens of all sequences, packed: [tokens, heads, head_dim] in float64, as they are stored."""

    query: Array
    key: Array
    value: Array


class Paged:
    """One cache of one kind over random blocks, its arena and its attention. Sequences have room for `longest` tokens.

    `rng` draws tokens, `places` which blocks they go to: the same tokens may lie elsewhere.
    """

    def __init__(
        self,
        kind: MemoryKind,
        shape: Shape,
        longest: Sequence[int],
        *,
        stream: Any,
        places: np.random.Generator,
        host_share: float = 0.4,
        capacity: Any = None,
        arena_bytes: int = 64 * MIB,
    ) -> None:
        self.kind, self.shape, self.stream = kind, shape, stream
        counts = [max(1, math.ceil(n / shape.block_size)) for n in longest]
        total = sum(counts) + 3
        num_host = 0 if kind is MemoryKind.DEVICE else min(total - 1, round(total * host_share))
        self.memory = KVMemory(kind, shape.spec, total - num_host, num_host)
        for slab in {self.memory.device.slab, *([self.memory.host.slab] if self.memory.host else [])}:
            slab.fill(POISON, stream=stream)
        self.kv = PagedKV.of(self.memory, shape.spec, dtype=shape.dtype)
        self.arena = Arena(arena_bytes)
        self.table = self.arena.array(np.full((len(longest), max(counts) + 1), -7, np.int32))
        blocks = places.permutation(total).astype(np.int32)
        for row, part in zip(self.table.host, np.split(blocks, np.cumsum(counts))[: len(longest)], strict=True):
            row[: len(part)] = part
        split = shape.split_tokens
        self.attention = PagedAttention(self.kv, num_q_heads=shape.num_q_heads, capacity=capacity, split_tokens=split)

    def rows(self, rng: np.random.Generator, num_tokens: int) -> Rows:
        s, draw = self.shape, rng.standard_normal
        heads = (s.num_q_heads, s.num_kv_heads, s.num_kv_heads)
        stored = (to_stored(draw((num_tokens, h, s.head_dim)), s.dtype) for h in heads)
        return Rows(*(from_stored(values, s.dtype) for values in stored))

    def shared(self, values: Array) -> Shared:
        dtype = self.shape.dtype
        return self.arena.array(to_stored(values, dtype), dtype)

    def append(self, rows: Rows, query_lens: Array, context_lens: Array, *, layer: int) -> None:
        """The last `query_lens` tokens of each sequence."""
        seqs = np.repeat(np.arange(len(query_lens), dtype=np.int32), query_lens)
        positions = [np.arange(c - q, c, dtype=np.int32) for q, c in zip(query_lens, context_lens, strict=True)]
        at = {"seqs": self.arena.array(seqs).device, "positions": self.arena.array(np.concatenate(positions)).device}
        key, value = self.shared(rows.key).device, self.shared(rows.value).device
        append_kv(self.kv, layer, key, value, **at, block_table=self.table.device, stream=self.stream)

    def plan(self, query_lens: Array, context_lens: Array, **options: Any) -> None:
        lengths = {"query_lens": query_lens, "context_lens": context_lens}
        self.attention.plan(**lengths, block_table=self.table.host, stream=self.stream, **options)

    def attend(self, rows: Rows, *, layer: int) -> Array:
        """The stored output, poisoned before."""
        query, out = self.shared(rows.query), self.shared(np.zeros_like(rows.query))
        out.host.view(np.uint8)[...] = POISON
        self.attention.run(layer, query.device, out.device, block_table=self.table.device, stream=self.stream)
        self.stream.synchronize()
        return out.host.copy()

    def error(self, out: Array, expected: Array) -> float:
        got = from_stored(out, self.shape.dtype)
        return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))

    def close(self) -> None:
        self.stream.synchronize()
        self.attention.close()
        self.arena.close()
        self.memory.close()


def whole(cache: Paged, rng: np.random.Generator, query_lens: Sequence[int], context_lens: Sequence[int]) -> Any:
    """Appends every token of every sequence to layer 1, and answers (rows of the new tokens, expected output)."""
    queries, contexts = np.int32(query_lens), np.int32(context_lens)
    rows = cache.rows(rng, int(contexts.sum()))
    cache.append(rows, contexts, contexts, layer=1)
    ends = np.cumsum(contexts)
    new = np.concatenate([np.arange(e - q, e) for q, e in zip(queries, ends, strict=True)]).astype(int)
    per_sequence = [(rows.key[e - n : e], rows.value[e - n : e]) for n, e in zip(contexts, ends, strict=True)]
    only_new = Rows(rows.query[new], rows.key[new], rows.value[new])
    cache.plan(queries, contexts)
    return only_new, attention_in_float64(only_new.query, queries, per_sequence)


def attention_in_float64(query: Array, query_lens: Array, per_sequence: Sequence[tuple[Array, Array]]) -> Array:
    """Dense, causal by position. `per_sequence`: K and V of each, [tokens, num_kv_heads, head_dim]."""
    out, start = np.zeros_like(query), 0
    for num_new, (keys, values) in zip(query_lens, per_sequence, strict=True):
        total, group = len(keys), query.shape[1] // keys.shape[1]
        q = query[start : start + num_new].reshape(num_new, keys.shape[1], group, query.shape[2])
        scores = np.einsum("thgd,jhd->thgj", q, keys, optimize=True) / math.sqrt(query.shape[2])
        position = np.arange(total - num_new, total)[:, None, None, None]
        scores = np.where(np.arange(total) <= position, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("thgj,jhd->thgd", weights, values, optimize=True)
        out[start : start + num_new] = attended.reshape(num_new, *query.shape[1:])
        start += num_new
    return out
