"""The kernels on the KV of a KVMemory: append new rows, and paged attention split over the context.

    attention = PagedAttention(PagedKV.of(memory, spec, dtype="float16"), num_q_heads=32)
    attention.plan(query_lens=..., context_lens=..., block_table=host_table, stream=stream)      once a step
    for layer in range(num_layers):
        append_kv(attention.kv, layer, key, value, seqs=..., positions=..., block_table=table, stream=stream)
        attention.run(layer, query, out, block_table=table, stream=stream)

Device arrays are anything with DLPack or `__cuda_array_interface__`; host arrays are NumPy's. What split a token falls
into depends on positions alone, so the same plan gives bit-identical output wherever its blocks lie.

`append_kv` and `run` can be captured into a CUDA graph, `plan` cannot: it is called before each replay, on the same
stream, with a `capacity` fixed beforehand, so that buffers stay where they are.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.memory.copies import Placed
from uvm_kv.memory.extension import extension
from uvm_kv.memory.kv_memory import KVMemory
from uvm_kv.memory.slab import Slab
from uvm_kv.memory.streams import new_event, stream_handle
from uvm_kv.types import CHUNK_BYTES, DTYPE_BYTES, ceil_div

HostInts = npt.NDArray[np.int32]


class PagedKV:
    """K and V of all layers as the kernels see them. Block ids are those of the KVMemory: device blocks come first."""

    def __init__(self, raw: Any, spec: KVCacheSpec, dtype: str, device: int) -> None:
        self.raw, self.spec, self.dtype, self.device = raw, spec, dtype, device

    @classmethod
    def of(cls, memory: KVMemory, spec: KVCacheSpec, *, dtype: str, staging: Placed | None = None) -> PagedKV:
        """`dtype`: float16, bfloat16 or float32, of `spec.dtype_bytes`. ValueError: a shape that no kernel serves.

        `staging`: device memory for copies of host blocks, a ring over layers: layer l has place (staged_first + l) %
        its layers. Their ids follow those of both tiers.
        """
        if DTYPE_BYTES.get(dtype) != spec.dtype_bytes:
            raise ValueError(f"dtype={dtype}, and the cache has elements of {spec.dtype_bytes} bytes")
        near, far = memory.device, memory.host
        raw = extension().KVView(
            near=near.layout,
            near_slab=near.slab.address,
            far=None if far is None else far.layout,
            far_slab=0 if far is None else far.slab.address,
            staged=None if staging is None else staging.layout,
            staged_slab=0 if staging is None else staging.slab.address,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            block_size=spec.block_size,
            dtype=dtype,
            device=int(near.slab.raw.device),
        )
        return cls(raw, spec, dtype, int(near.slab.raw.device))

    def set_staged_first(self, place: int) -> None:
        """Where layer 0 has its place in the ring of staged copies, for launches from here on. ValueError: no place."""
        self.raw.staged_first = place


def append_kv(
    kv: PagedKV,
    layer: int,
    key: Any,
    value: Any,
    *,
    seqs: Any,
    positions: Any,
    block_table: Any,
    indptr: Any = None,
    stream: object,
) -> None:
    """Copies new rows, RoPE already applied, into their slots.

    Args:
        key, value: [tokens, num_kv_heads, head_dim] of the cache's dtype; tokens may lie further apart.
        seqs: int32 [tokens], row of the block table; a negative one skips the token.
        positions: int32 [tokens], position in the sequence. Its block must be in the table: nobody checks on the GPU.
        block_table: int32 [sequences, blocks], or int32 [entries] with `indptr` int32 [sequences + 1].

    Raises ValueError for dtype, shape, strides, alignment, layer; TypeError for what is no device array.
    """
    table = {"block_table": block_table, "indptr": indptr}
    where = {"seqs": seqs, "positions": positions, **table}
    extension().append_kv(kv.raw, layer, key, value, **where, stream=stream_handle(stream))


def plan_capacity(
    kv: PagedKV, *, num_q_heads: int, query_lens: HostInts, context_lens: HostInts, split_tokens: int = 0
) -> Any:
    """What the plan of a batch takes: narrow_items, wide_items, merges, partial_rows, plan_bytes, workspace_bytes()."""
    lengths = {"query_lens": _ints(query_lens), "context_lens": _ints(context_lens)}
    return extension().count_plan(kv.raw, num_q_heads=num_q_heads, split_tokens=split_tokens, **lengths)


class PagedAttention:
    """Plan buffers and workspace for one stream of attention calls.

    Args:
        capacity: of `plan_capacity`, for the largest batch to come; buffers then never move, as a captured graph needs.
            None: buffers grow as plans do.
        split_tokens: length of a split, a multiple of 128; 0 for the default of the head size.
        num_host_workers: warps that start with the pieces read over the link; 0 for the default.
    """

    def __init__(
        self,
        kv: PagedKV,
        *,
        num_q_heads: int,
        capacity: Any = None,
        split_tokens: int = 0,
        num_host_workers: int = 0,
    ) -> None:
        self.kv, self.num_q_heads, self.split_tokens = kv, num_q_heads, split_tokens
        self._num_host_workers = num_host_workers
        self._fixed, self._planned = capacity, None
        self._staging: list[_Staging] = []
        self._plan: Slab | None = None
        self._workspace: Slab | None = None

    def plan(
        self,
        *,
        query_lens: HostInts,
        context_lens: HostInts,
        block_table: HostInts,
        indptr: HostInts | None = None,
        block_on_host: npt.NDArray[np.uint8] | None = None,
        stream: object,
    ) -> None:
        """Divides the step's attention into pieces and sends the plan to the device.

        Args:
            query_lens: int32 [sequences], new tokens; 0: the sequence has no part in this step.
            context_lens: int32 [sequences], tokens of each sequence with the new ones.
            block_table: int32 [sequences, blocks] in host memory, or int32 [entries] with `indptr`.
            block_on_host: uint8 [num_blocks], for managed memory: blocks that the caller believes to be read over the
                link. The others' place is known. It sets the order of work and never the result.

        Raises ValueError for lengths or blocks that do not fit, or a batch above the fixed capacity.
        """
        shape = {"num_q_heads": self.num_q_heads, "split_tokens": self.split_tokens}
        lengths = {"query_lens": _ints(query_lens), "context_lens": _ints(context_lens)}
        table = {"block_table": _ints(block_table), "indptr": None if indptr is None else _ints(indptr)}
        flags = None if block_on_host is None else np.ascontiguousarray(block_on_host, np.uint8)
        capacity = self._fixed or extension().count_plan(self.kv.raw, **shape, **lengths)
        plan, staging = self._room_for(capacity, stream)
        rest = {"block_on_host": flags, "capacity": capacity, "out": staging.free_bytes(capacity.plan_bytes)}
        extension().fill_plan(self.kv.raw, **shape, **lengths, **table, **rest)
        staging.send(plan, capacity.plan_bytes, stream)
        self._planned = capacity

    def run(
        self,
        layer: int,
        query: Any,
        out: Any,
        *,
        block_table: Any,
        indptr: Any = None,
        scale: float | None = None,
        stream: object,
    ) -> None:
        """Attention of the planned batch in one layer; causal over each sequence's own tokens.

        Args:
            query, out: [tokens, num_q_heads, head_dim] of the cache's dtype, sequences one after the other.
            block_table: the planned table in device memory.
            scale: of the scores; None: 1 / sqrt(head_dim).

        Raises ValueError for dtype, shape, strides, alignment, layer, head size; TypeError for what is no device array.
        """
        if self._planned is None or self._plan is None or self._workspace is None:
            raise ValueError("run() before plan(): the batch is not known")
        scale = 1 / math.sqrt(self.kv.spec.head_dim) if scale is None else scale
        buffers = {"plan": self._plan.raw, "capacity": self._planned, "workspace": self._workspace.raw}
        table = {"block_table": block_table, "indptr": indptr}
        options = {"num_q_heads": self.num_q_heads, "scale": scale, "num_host_workers": self._num_host_workers}
        extension().paged_attention(
            self.kv.raw, layer, query, out, **table, **buffers, **options, stream=stream_handle(stream)
        )

    def close(self) -> None:
        for slab in (self._plan, self._workspace, *(s.slab for s in self._staging)):
            if slab is not None:
                slab.close()
        self._plan = self._workspace = self._planned = None
        self._staging = []

    def _room_for(self, capacity: Any, stream: object) -> tuple[Slab, _Staging]:
        """Buffers only grow, to the next power of two chunks: freeing device memory waits for the whole device."""
        device = self.kv.device
        if self._plan is None or self._plan.num_bytes < capacity.plan_bytes:
            for old in (self._plan, *(s.slab for s in self._staging)):
                if old is not None:
                    old.close()
            size = _room(capacity.plan_bytes)
            self._plan = Slab.device(size, device=device)
            self._staging = [_Staging(Slab.pinned(size, device=device)) for _ in range(2)]
        needed = capacity.workspace_bytes(self.kv.spec.head_dim)
        if self._workspace is None or self._workspace.num_bytes < needed:
            if self._workspace is not None:
                self._workspace.close()
            self._workspace = Slab.device(_room(needed), device=device)
            extension().init_workspace(self.kv.raw, self._workspace.raw, stream=stream_handle(stream))
        self._staging.reverse()  # They take turns.
        return self._plan, self._staging[0]


class _Staging:
    """Pinned memory for a plan on its way; written again only when the last copy out of it has ended."""

    def __init__(self, slab: Slab) -> None:
        self.slab = slab
        self._sent = new_event(device=slab.device_ordinal)

    def free_bytes(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        self._sent.synchronize()
        return self.slab.host_view(offset=0, num_bytes=num_bytes)

    def send(self, target: Slab, num_bytes: int, stream: object) -> None:
        handle = stream_handle(stream)
        extension().send_plan(self.slab.raw, target.raw, num_bytes=num_bytes, stream=handle)
        self._sent.record(stream=handle)


def _room(num_bytes: int) -> int:
    chunks = ceil_div(num_bytes, CHUNK_BYTES)
    return (1 << (chunks - 1).bit_length()) * CHUNK_BYTES


def _ints(values: npt.ArrayLike) -> HostInts:
    """TypeError for what are no integers."""
    return np.ascontiguousarray(np.asarray(values).astype(np.int32, casting="same_kind", copy=False))
