"""A decode batch over paged KV, in memory of any kind: built, checked against float64, and ready to be timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.gpu_kit.microbench.bench import Array, Bench, Memory, NotRunError, WrongResultError
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.memory import KVMemory, MemAdvice, PagedAttention, PagedKV, advise, copy_blocks, probes
from uvm_kv.memory.copies import CopyMethod, Placed
from uvm_kv.memory.extension import extension
from uvm_kv.memory.layout import slab_bytes, slab_layout
from uvm_kv.memory.residency import device_place, host_place, prefetch
from uvm_kv.types import Layout, MemoryKind, ceil_div

TOLERANCE = {"float16": 2e-3, "bfloat16": 1e-2}
"""Largest error of an output, in norm: rounding of the output alone is 3e-4 and 2e-3, one wrong token of 4096 2e-2."""
NUM_CHECKED = 3
"""Sequences that float64 goes over."""
QUERY_SCALE = 4.0
"""So that the softmax is not flat: scores spread by about 1.3."""
POISON = 0xFF
"""Every byte of an output before it is written: not a number, in fp16 and bf16."""


@dataclass(frozen=True)
class Shape:
    """Shape of a decode step: one query token per sequence."""

    num_kv_heads: int
    dtype: str = "float16"
    num_seqs: int = 32
    context: int = 4096
    num_q_heads: int = 32
    head_dim: int = 128
    block_size: int = 16

    @property
    def name(self) -> str:
        heads = "MHA" if self.num_kv_heads == self.num_q_heads else f"GQA {self.num_q_heads}/{self.num_kv_heads}"
        return f"{heads} {self.dtype}, {self.num_seqs} x {self.context}"

    def spec(self, num_layers: int) -> KVCacheSpec:
        return KVCacheSpec(num_layers, self.num_kv_heads, self.head_dim, 2, self.block_size, Layout.LAYER_MAJOR)

    @property
    def seq_blocks(self) -> int:
        return self.context // self.block_size

    @property
    def num_blocks(self) -> int:
        return self.num_seqs * self.seq_blocks

    @property
    def kv_bytes(self) -> int:
        """K and V that one layer's attention reads."""
        return self.num_seqs * self.context * self.spec(1).layer_token_bytes

    @property
    def row_bytes(self) -> int:
        """Query, or output, of the batch in one layer."""
        return self.num_seqs * self.num_q_heads * self.head_dim * 2


def scattered_table(shape: Shape, blocks: Sequence[int], seed: int) -> Array:
    """int32 [sequences, blocks], the blocks dealt out at random, as a cache that has been used for a while is."""
    order = np.random.default_rng(seed).permutation(np.asarray(blocks, np.int32))
    return order.reshape(shape.num_seqs, shape.seq_blocks)


def split_table(shape: Shape, device_blocks: Sequence[int], host_blocks: Sequence[int], seed: int) -> Array:
    """The last blocks of every sequence lie on the host, the same number of each: what has overflowed."""
    rng = np.random.default_rng(seed)
    far = rng.permutation(np.asarray(host_blocks, np.int32)).reshape(shape.num_seqs, -1)
    num_near = shape.num_blocks - far.size
    near = rng.permutation(np.asarray(device_blocks, np.int32))[:num_near].reshape(shape.num_seqs, -1)
    return np.concatenate([near, far], axis=1)


def fill_kv(bench: Bench, kv: KVMemory, dtype: str) -> None:
    """Random numbers in both tiers, written by the device; each tier by itself, also where one slab holds both."""
    for seed, placed in enumerate((kv.device, kv.host)):
        if placed is not None:
            begin, end = int(placed.layout.base_bytes), int(placed.layout.end_bytes)
            tier = probes.span(placed.slab, offset=begin, num_bytes=end - begin)
            probes.fill_random(tier, dtype, seed=17 + seed, stream=bench.stream)
    bench.stream.synchronize()


def place_managed(bench: Bench, kv: KVMemory, spec: KVCacheSpec) -> None:
    """Host blocks of managed memory: preferred on the host and mapped for the device; device blocks the other way.
    Chunks of both would be torn, so device blocks must fill whole chunks."""
    if kv.num_device_blocks % spec.pieces_per_chunk:
        raise ValueError(f"{kv.num_device_blocks} device blocks do not fill chunks of {spec.pieces_per_chunk}")
    slab, layout = kv.device
    layers = (0, spec.num_layers)
    near = layout.ranges(list(range(kv.num_device_blocks)), layers=layers)
    far = layout.ranges(list(range(kv.num_device_blocks, kv.num_device_blocks + kv.num_host_blocks)), layers=layers)
    stream = bench.stream
    advise(slab, far, MemAdvice.SET_ACCESSED_BY, device_place(), stream=stream)
    for parts, place in ((near, device_place()), (far, host_place())):
        advise(slab, parts, MemAdvice.SET_PREFERRED_LOCATION, place, stream=stream)
        prefetch(slab, parts, place, stream=stream)
    stream.synchronize()


def new_kv(
    bench: Bench, memory: Memory, kind: MemoryKind, shape: Shape, num_layers: int, device: int, host: int
) -> KVMemory:
    """A filled KVMemory of at least that many blocks in each tier."""
    spec = shape.spec(num_layers)
    if kind is MemoryKind.VMM:
        device, host = (whole_granules(spec, num) for num in (device, host))
    if kind is MemoryKind.MANAGED:
        device = spec.pieces_per_chunk * ceil_div(device, spec.pieces_per_chunk)
    kv = memory.kv(kind, spec, device, host)
    if kind is MemoryKind.MANAGED:
        place_managed(bench, kv, spec)
    fill_kv(bench, kv, shape.dtype)
    return kv


def whole_granules(spec: KVCacheSpec, num_blocks: int) -> int:
    """Blocks whose slab is a multiple of the granularity of virtual memory; as many or more."""
    c = extension()
    unit = int(c.VmmResource(device=0, device_bytes=0, numa_node=max(0, c.host_numa_node(0))).granularity)
    while slab_bytes(spec, num_blocks) % unit:
        num_blocks += spec.pieces_per_chunk - num_blocks % spec.pieces_per_chunk
    return num_blocks


class DecodeBatch:
    """One shape over one KVMemory: a query and an output for every layer, and block tables to rotate among.

    All tables must have their host blocks in the same places, since they share a plan.
    """

    def __init__(
        self,
        bench: Bench,
        memory: Memory,
        kv: KVMemory,
        shape: Shape,
        tables: Sequence[Array],
        *,
        num_layers: int,
        split_tokens: int = 0,
        num_host_workers: int = 0,
    ) -> None:
        self.bench, self.kv, self.shape, self.num_layers = bench, kv, shape, num_layers
        self.tables = [np.ascontiguousarray(table, np.int32) for table in tables]
        self._paged = PagedKV.of(kv, shape.spec(num_layers), dtype=shape.dtype)
        self._query_slab = memory.device(num_layers * shape.row_bytes)
        self._out_slab = memory.device(num_layers * shape.row_bytes)
        self._table_slab = memory.device(sum(table.nbytes for table in self.tables))
        bench.upload(self._table_slab, np.concatenate([table.reshape(-1) for table in self.tables]))
        queries = probes.span(self._query_slab)
        probes.fill_random(queries, shape.dtype, seed=5, scale=QUERY_SCALE, stream=bench.stream)
        rows = (shape.num_seqs, shape.num_q_heads, shape.head_dim)
        offsets = [layer * shape.row_bytes for layer in range(num_layers)]
        self.queries = [self._query_slab.view(rows, shape.dtype, offset=offset) for offset in offsets]
        self.outs = [self._out_slab.view(rows, shape.dtype, offset=offset) for offset in offsets]
        table_bytes = self.tables[0].nbytes
        self._table_views = [
            self._table_slab.view(self.tables[0].shape, "int32", offset=i * table_bytes) for i in range(len(tables))
        ]
        options: dict[str, Any] = {"split_tokens": split_tokens, "num_host_workers": num_host_workers}
        self.attention = PagedAttention(self._paged, num_q_heads=shape.num_q_heads, **options)
        memory.keep(self.attention.close)
        self._plan()

    def _plan(self) -> None:
        shape, kv = self.shape, self.kv
        flags = None
        if kv.kind is MemoryKind.MANAGED:
            flags = (np.arange(kv.num_device_blocks + kv.num_host_blocks) >= kv.num_device_blocks).astype(np.uint8)
        self.attention.plan(
            query_lens=np.ones(shape.num_seqs, np.int32),
            context_lens=np.full(shape.num_seqs, shape.context, np.int32),
            block_table=self.tables[0],
            block_on_host=flags,
            stream=self.bench.stream,
        )

    def enqueue(self, index: int) -> None:
        """The attention of one layer; another layer, then another table, from call to call."""
        layer, table = index % self.num_layers, index // self.num_layers % len(self.tables)
        self._run(layer, table)

    def _run(self, layer: int, table: int) -> None:
        self.attention.run(
            layer,
            self.queries[layer],
            self.outs[layer],
            block_table=self._table_views[table],
            stream=self.bench.stream,
        )

    def output(self, layer: int, table: int) -> Array:
        """Run once into poisoned memory; uint16 bits [sequences, query heads, head size]."""
        self._out_slab.fill(POISON, stream=self.bench.stream)
        self._run(layer, table)
        return self.bits(self._out_slab, layer)

    def bits(self, slab: Any, layer: int) -> Array:
        shape = self.shape
        raw = self.bench.download(slab, shape.row_bytes, offset=layer * shape.row_bytes)
        return raw.view(np.uint16).reshape(shape.num_seqs, shape.num_q_heads, shape.head_dim)

    def check(self, layer: int = 0, table: int = 0) -> tuple[Array, float]:
        """The output's bits and its error against float64; WrongResultError where it is too large."""
        bits = self.output(layer, table)
        out = to_float64(bits, self.shape.dtype)
        if np.isnan(out).any():
            raise WrongResultError(f"{self.shape.name}: parts of the output were not written, or are not numbers")
        query = to_float64(self.bits(self._query_slab, layer), self.shape.dtype)
        error = 0.0
        for seq in np.linspace(0, self.shape.num_seqs - 1, NUM_CHECKED).astype(int):
            blocks = self.tables[table][seq]
            key, value = read_blocks(self.bench, self.kv, self.shape, self.num_layers, blocks, layer)
            error = max(error, relative_error(out[seq], attend(query[seq], key, value)))
        if not error <= TOLERANCE[self.shape.dtype]:
            raise WrongResultError(f"{self.shape.name}: error {error:.2e}, at most {TOLERANCE[self.shape.dtype]:.0e}")
        return bits, error

    def check_again(self, bits: Array, layer: int = 0, table: int = 0) -> None:
        """After timing: the same bits once more, or there is a race."""
        if not np.array_equal(bits, self.output(layer, table)):
            raise WrongResultError(f"{self.shape.name}: the same input gave another output after it was timed")


def read_blocks(
    bench: Bench, kv: KVMemory, shape: Shape, num_layers: int, blocks: Array, layer: int
) -> tuple[Array, Array]:
    """K and V of one sequence in one layer from wherever they lie, float64 [tokens, KV heads, head size]."""
    spec = shape.spec(num_layers)
    memory = Memory(bench.ledger)
    try:
        staging = memory.pinned(slab_bytes(spec, len(blocks)))
        target = Placed(staging, slab_layout(spec, num_blocks=len(blocks)))
        for placed in (kv.device, kv.host):
            found = [(kv.locate(int(block)), at) for at, block in enumerate(blocks)]
            pairs = [(index, at) for (where, index), at in found if where is placed]
            if pairs and placed is not None:
                layers, method = (layer, layer + 1), CopyMethod.KERNEL
                copy_blocks(placed, target, pairs, layers=layers, method=method, stream=bench.stream)
        bench.stream.synchronize()
        pieces = [
            staging.host_view(offset=int(target.layout.offset(at, layer)), num_bytes=spec.layer_block_bytes)
            for at in range(len(blocks))
        ]
        raw = np.stack(pieces).view(np.uint16)
    finally:
        memory.close()
    return split_kv(to_float64(raw, shape.dtype), shape)


def split_kv(raw: Array, shape: Shape) -> tuple[Array, Array]:
    """[blocks, K or V, heads, slots, head size] as it lies, to K and V of [tokens, heads, head size]."""
    split = raw.reshape(-1, 2, shape.num_kv_heads, shape.block_size, shape.head_dim)
    rows = split.transpose(1, 0, 3, 2, 4).reshape(2, -1, shape.num_kv_heads, shape.head_dim)
    return rows[0], rows[1]


def to_float64(bits: Array, dtype: str) -> Array:
    """From 16-bit storage."""
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float64)
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    raise NotRunError(f"no reference for {dtype}")


def attend(query: Array, key: Array, value: Array) -> Array:
    """[query heads, head size] of one sequence whose K and V are [tokens, KV heads, head size]."""
    num_q_heads, head_dim = query.shape
    group = num_q_heads // key.shape[1]
    out = np.empty_like(query)
    for head in range(key.shape[1]):
        rows = slice(head * group, (head + 1) * group)
        scores = query[rows] @ key[:, head].T / np.sqrt(head_dim)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[rows] = weights @ value[:, head] / weights.sum(axis=1, keepdims=True)
    return out


def relative_error(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
